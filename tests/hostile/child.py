"""Reads hostile files, each in a fork of this warm process, and says on stdout how each reading ended.

python -m tests.hostile.child < cases, a line each: reader, tab, path. A fork has an audit hook, 3 GiB of address
space beyond what libraries had mapped before (torch's CUDA builds map several GiB by themselves), and 20 s.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx  # noqa: F401
import onnxruntime
import onnxruntime.capi.onnxruntime_inference_collection  # noqa: F401
import torch
from google.protobuf import text_format  # noqa: F401
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from kdcli.base import pickles
from kdcli.base.errors import KdError
from kdcli.caffe.read import read_caffemodel, read_mean, read_prototxt
from kdcli.data import decode, load
from kdcli.deploy.onnx_model import OnnxClassifier
from kdcli.models import checkpoint

SECONDS = 20
MEMORY = 3 << 30
FORBIDDEN = (
    "os.system", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "pty.",
    "socket.", "ctypes.", "webbrowser", "shutil.unpack", "marshal.", "pickle.", "os.symlink", "os.link",
    "urllib.", "ftplib.", "http.", "exec", "compile", "import",
)  # fmt: skip
OWN_HEADER = "b\"{'descr': '"  # numpy parses so what kd has written into its cache itself
TRUSTED = tuple(
    {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(__file__).resolve().parents[2])}
)


def _load(path: Path) -> object:
    return load(str(path), cache_dir=path.parent / f"cache of {path.name}")


def _pickle_of_python(path: Path) -> object:
    return pickle.loads(path.read_bytes())


def _cut_at_each_kilobyte(path: Path) -> object:
    """All but the last must be refused; so is the last, for what is left of the file is nothing."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(path, folder))
        for end in range((path.stat().st_size - 1) // 1024 * 1024, 0, -1024):
            os.truncate(copy, end)
            try:
                read_caffemodel(copy)
            except KdError:
                continue
            raise AssertionError(f"{end} bytes of the file were taken for a whole one")
    raise KdError("each cut was refused")


READERS: dict[str, Callable[[Path], object]] = {
    "pickle": lambda path: pickles.load_pickle(path.read_bytes()),
    "npy": pickles.load_npy,
    "data": _load,
    "image": lambda path: decode.decode(path.read_bytes(), path.name),
    "pt": checkpoint.load,
    "onnx": OnnxClassifier.load,
    "caffemodel": read_caffemodel,
    "caffemodel, cut": _cut_at_each_kilobyte,
    "mean": read_mean,
    "prototxt": read_prototxt,
    # These prove that the watch sees what it is to see.
    "python's own pickle": _pickle_of_python,
    "endless": lambda path: time.sleep(2 * SECONDS),
    "greedy": lambda path: np.empty(MEMORY // 4),
}


def _is_trusted(name: object) -> bool:
    return isinstance(name, str) and (name.startswith(TRUSTED) or name.startswith("<frozen"))


def _watch(seen: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            not event.startswith(FORBIDDEN) or event == "socket.gethostname"
        ):  # scratch files are named by host
            return
        if event == "exec" and _is_trusted(getattr(arguments[0], "co_filename", None)):
            return
        if event == "compile" and (_is_trusted(arguments[1]) or str(arguments[0]).startswith(OWN_HEADER)):
            return
        if event == "import" and arguments[0].partition(".")[0] in known:
            return
        if event == "marshal.loads" or (event == "pickle.find_class" and arguments[0].startswith("torch")):
            return  # the import system reading its own .pyc files
        seen.append(f"{event} {str(arguments)[:200]}")

    known = {*sys.stdlib_module_names, *(name.partition(".")[0] for name in sys.modules)}
    return hook


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _read(reader: str, path: Path) -> dict[str, Any]:
    """In the fork: how reading ends. A folder `many …` stands for its files; the first odd one counts."""
    seen: list[str] = []
    most = _mapped() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_watch(seen))
    outcomes: dict[str, int] = {}
    message = ""
    for file in sorted(path.iterdir()) if path.name.startswith("many ") else [path]:
        try:
            READERS[reader](file)
            outcome = "read"
        except KdError as error:
            outcome, message = "KdError", error.message
            if not error.message.isprintable() and "\n" in error.message:
                outcome = "KdError of several lines"
        except BaseException:
            outcome, message = "another error", f"{file.name}: {traceback.format_exc(limit=-3)}"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome not in ("read", "KdError"):
            break
    return {"outcomes": outcomes, "message": message, "events": seen}


def run(reader: str, path: Path) -> dict[str, Any]:
    """How reading a file ended in a fork: outcome, message, events, what was printed, seconds."""
    folder = Path(tempfile.mkdtemp())
    started = time.monotonic()
    process = os.fork()
    if process == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
        try:
            found = _read(reader, path)
            (folder / "found").write_text(json.dumps(found))
        finally:
            os._exit(0)
    status = None
    while time.monotonic() - started < SECONDS and status is None:
        done, code = os.waitpid(process, os.WNOHANG)
        status = code if done else None
        time.sleep(0.002)
    if status is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found: dict[str, Any] = {"outcomes": {"too slow": 1}, "message": "", "events": []}
    elif (folder / "found").exists():
        found = json.loads((folder / "found").read_text())
    else:
        found = {"outcomes": {f"status {status}": 1}, "message": "", "events": []}
    printed = "".join((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    shutil.rmtree(folder)
    return {**found, "printed": printed, "seconds": round(time.monotonic() - started, 2)}


def _warm_up() -> None:
    """Read good files of every kind, so that what libraries import and make up at first use is not taken for harm."""
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "test"):
            for number, kind in enumerate(("png", "jpeg", "webp", "bmp")):
                path = Path(folder, "set", split, f"class {number % 2}", f"{number}.{kind}")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8)).save(path)
        _load(Path(folder, "set"))
        path = Path(folder, "x.pt")
        torch.save({"w": torch.zeros(2)}, path)
        with suppress(KdError):
            checkpoint.load(path)
        with suppress(KdError):
            pickles.load_pickle(b"X")


def main() -> None:
    """Answer each line of stdin with a line of JSON."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # as where kd reads images
    _warm_up()
    for line in sys.stdin:
        reader, _, path = line.rstrip("\n").partition("\t")
        print(json.dumps(run(reader, Path(path))), flush=True)


if __name__ == "__main__":
    main()
