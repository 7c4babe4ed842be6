from pagewire.cli import run

run()
