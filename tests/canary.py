"""Tries TorchTitan's newest pre-release with this project's code, and says what breaks: `make canary`.

It is installed in an environment of its own that is removed afterwards, over the packages of `.venv-titan-0.3`.
"""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

PARTS = {
    "a job's file becomes a config": "tests/unit/titan/test_job.py",
    "settings and functions": "tests/unit/titan/test_v0_3.py",
    "patches": "tests/upstream",
    "a run": "tests/e2e/test_train.py",
}


def main(uv: str) -> None:
    """Install it, run the parts, and print what fails; exit 0 whatever does."""
    with tempfile.TemporaryDirectory(prefix="canary-") as folder:
        packages = Path(folder, "packages")
        install = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--target", str(packages)]
        newest = subprocess.run(
            [*install, "--no-deps", "--prerelease=allow", "torchtitan"], capture_output=True, text=True, timeout=300
        )
        if newest.returncode:
            sys.exit(f"Can't install it: {newest.stderr}")
        [info] = packages.glob("torchtitan-*.dist-info")
        found = info.name.removeprefix("torchtitan-").removesuffix(".dist-info")
        if found == version("torchtitan"):
            print(f"There is no newer TorchTitan than {found}, which is supported.")
            return
        print(f"TorchTitan {found}, with the packages of {version('torchtitan')} around it:")
        for name, part in PARTS.items():
            ended = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", part],
                env=os.environ | {"PYTHONPATH": str(packages), "CANARY": ".".join(found.split(".")[:2])},
                capture_output=True,
                text=True,
                timeout=900,
            )
            *_, last = ended.stdout.strip().splitlines() or [ended.stderr.strip()]
            print(f"{name} ({part}): {last}")
            print(
                "".join(
                    f"  {line}\n" for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))
                )
            )


if __name__ == "__main__":
    main(sys.argv[1])
