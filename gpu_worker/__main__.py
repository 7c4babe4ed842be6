from gpu_worker.cli import main
from protocol.options import start

start(main, "pagewire worker")
