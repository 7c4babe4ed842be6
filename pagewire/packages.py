"""Whether the packages that will be started are ours: PyPI has others of the same names."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

PACKAGES = {"frontend": "FrontendSettings", "scheduler_svc": "SchedulerSettings", "gpu_worker": "WorkerSettings", "protocol": ""}


def intruder() -> str:
    """One line that names a package which is not ours or not beside us, and what to do; empty if all are."""
    home = Path(__file__).resolve().parent.parent
    for package, settings in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return f"the package {package!r} is missing beside {home / 'pagewire'}: install pagewire again"
        folder = Path(spec.origin).resolve().parent
        if folder != home / package or (settings and f"class {settings}" not in _text(folder / "settings.py")):
            return f"{folder} is not Pagewire's{_owner(package)}: uninstall that one, then install pagewire again"
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _owner(package: str) -> str:
    """The other distributions that installed a package of this name, in brackets."""
    names = {name for name in importlib.metadata.packages_distributions().get(package, ()) if name != "pagewire"}
    return f" (it comes with the distribution {', '.join(sorted(names))})" if names else ""
