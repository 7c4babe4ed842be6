"""Write the pages of `docs/reference/` from the code; `make docs` does so before it builds them."""

from __future__ import annotations

from pathlib import Path

from api_page import api_page
from command_pages import commands_page, settings_page
from message_page import messages_page
from metric_page import metrics_page

FOLDER = Path(__file__).resolve().parents[1] / "reference"
PAGES = {
    "api.md": api_page,
    "commands.md": commands_page,
    "settings.md": settings_page,
    "metrics.md": metrics_page,
    "protocol.md": messages_page,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        path, text = FOLDER / name, make()
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"written: docs/reference/{name}")
