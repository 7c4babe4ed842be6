from protocol.options import start
from scheduler_svc.cli import main

start(main, "pagewire scheduler")
