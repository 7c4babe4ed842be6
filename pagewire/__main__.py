from pagewire.cli import main
from protocol.options import start

start(main, "pagewire")
