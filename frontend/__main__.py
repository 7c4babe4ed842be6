from frontend.cli import main
from protocol.options import start

start(main, "pagewire frontend")
