"""Pictures out of the compressed data of DICOM files.

Decoders are native code and the data may be hostile, so that they run in a child process with limited memory and time;
a crash costs one file and never the parent. Inside a worker process, which is such a child already, they run in place.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import mmap
import multiprocessing
import os
import re
import resource
import signal
import struct
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Shaped

from medssl.errors import ReadError

_RLE = {"1.2.840.10008.1.2.5"}
_JPEG_LOSSY = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 53, 55)}
_JPEG_LOSSLESS = {f"1.2.840.10008.1.2.4.{n}" for n in (57, 70)}
_JPEG_LS = {f"1.2.840.10008.1.2.4.{n}" for n in (80, 81)}
_JPEG_2000 = {f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 201, 202, 203)}  # the last three are HTJ2K
_KNOWN = _RLE | _JPEG_LOSSY | _JPEG_LOSSLESS | _JPEG_LS | _JPEG_2000

_SYNTAX = re.compile(r"1\.2\.840\.10008\.1\.2[.0-9]{0,16}")

_LIMIT_BYTES = 2 << 30
_LIMIT_S = 20.0
_SLOT_ITEMSIZE = 4
_STANDALONE_MARKERS = {0x01, *range(0xD0, 0xD9)}
_START_OF_FRAME = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}
_SIZ = b"\xff\x4f\xff\x51"
_SIZ_WITHIN = 4096


@dataclass(frozen=True)
class Spec:
    """What the header says of the pictures; a codestream of another size is refused before it is decoded.

    Args:
        transfer_syntax: UID.
        rows: Of one picture.
        columns: Of one picture.
        samples: Values a pixel: 1 or 3.
        bits_allocated: Bits a value; run-length data have no other word for them.
        photometric: As in the header; says whether the three values of a JPEG are RGB where the JPEG does not.
    """

    transfer_syntax: str
    rows: int
    columns: int
    samples: int = 1
    bits_allocated: int = 16
    photometric: str = "MONOCHROME2"


def gives_rgb(transfer_syntax: str) -> bool:
    """Whether colour comes out as RGB although the header names another space that the data hold."""
    return transfer_syntax in _JPEG_LOSSY


def precision(data: bytes) -> tuple[int, bool] | None:
    """Bits a value, and whether they are signed, as a JPEG 2000 codestream declares them; None for other data."""
    at = data.find(_SIZ, 0, _SIZ_WITHIN)
    if at < 0 or len(data) < at + 43:
        return None
    return (data[at + 42] & 0x7F) + 1, bool(data[at + 42] >> 7)


def decode(
    frames: Sequence[bytes], spec: Spec, *, names: Sequence[object]
) -> list[Shaped[np.ndarray, "y x"] | Shaped[np.ndarray, "y x 3"]]:
    """Decode pictures, on all cores, in the child process.

    Args:
        frames: Compressed data, one a picture.
        spec: What all of them must be.
        names: What to call each in an error: the path of its file.

    Returns:
        Arrays (rows, columns), with a last axis of 3 for colour, which is that of the header unless
        :func:`gives_rgb`. The type is that of the codestream: signed where it says so, and no wider than it must be.

    Raises:
        ReadError: E_CODEC for an unknown transfer syntax, E_CODEC_DATA for damaged data or another size,
            E_READER_CRASH, or E_READER_LIMIT over 2 GiB or 20 s for a picture.
    """
    if spec.transfer_syntax not in _KNOWN:
        named = spec.transfer_syntax if _SYNTAX.fullmatch(spec.transfer_syntax) else "that is none of the standard's"
        raise ReadError(
            f"{names[0]}: no decoder for transfer syntax {named}. Convert the file to an uncompressed one.",
            code="E_CODEC",
        )
    if multiprocessing.parent_process() is not None or os.getpid() != _CHILD.owner:
        return [_checked(_attempt(data, spec), name) for data, name in zip(frames, names, strict=True)]
    with _CHILD.lock:
        return [_checked(answer, name) for answer, name in zip(_CHILD.decode(frames, spec), names, strict=True)]


def dismiss() -> None:
    """End the child process; the next picture starts another."""
    if os.getpid() == _CHILD.owner:
        with _CHILD.lock:
            _CHILD.end()


def serve(pipe: Connection[Any, Any]) -> None:
    """Life of the child: decode batches until the parent is gone.

    Args:
        pipe: To the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # decoders complain there of every damaged file
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads, contextlib.suppress(EOFError, OSError):
        while True:
            request = json.loads(pipe.recv_bytes())
            spec = Spec(**request["spec"])
            frames = [pipe.recv_bytes() for _ in range(request["frames"])]
            slot = _slot_bytes(spec)
            memory = recv_handle(pipe)
            shared = mmap.mmap(memory, slot * len(frames))
            os.close(memory)
            _limit_memory(slot * len(frames))
            jobs = ((data, spec, memoryview(shared)[index * slot :]) for index, data in enumerate(frames))
            for answer in threads.map(_serve_one, jobs):
                pipe.send_bytes(json.dumps(answer).encode())


def _serve_one(job: tuple[bytes, Spec, memoryview]) -> dict[str, Any]:
    """Decode into shared memory and say what lies there; JSON, since the parent must not unpickle what a child says."""
    data, spec, shared = job
    answer = _attempt(data, spec)
    if isinstance(answer, ReadError):
        return {"code": answer.code, "message": answer.message}
    np.frombuffer(shared, answer.dtype, count=answer.size)[:] = answer.ravel()
    return {"dtype": answer.dtype.str, "shape": answer.shape}


class _Child:
    """The process that decodes, started when it is first needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner = os.getpid()
        self._process: SpawnProcess | None = None
        self._pipe: Connection[Any, Any] | None = None

    def decode(self, frames: Sequence[bytes], spec: Spec) -> list[np.ndarray[Any, Any] | ReadError]:
        """Answers in order; after a crash the missing ones are tried one by one, and the culprit ends the list.

        One picture alone gets a second child too: the first may have been killed from outside while it was idle.
        """
        answers = list(self._batch(frames, spec))
        if _is_loss(answers[-1]) and (len(frames) > 1 or answers[-1].code == "E_READER_CRASH"):
            del answers[-1]
            for data in frames[len(answers) :]:
                answers.extend(self._batch([data], spec))
                if _is_loss(answers[-1]):
                    break
        missing = ReadError("was not decoded after the crash of another file.", code="E_READER_CRASH")
        return answers + [missing] * (len(frames) - len(answers))

    def _batch(self, frames: Sequence[bytes], spec: Spec) -> Iterator[np.ndarray[Any, Any] | ReadError]:
        slot = _slot_bytes(spec)
        memory = os.memfd_create("medssl-pictures", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, slot * len(frames))
            shared = mmap.mmap(memory, slot * len(frames))
            pipe, process = self._start()
            pipe.send_bytes(json.dumps({"spec": asdict(spec), "frames": len(frames)}).encode())
            for data in frames:
                pipe.send_bytes(data)
            send_handle(pipe, memory, process.pid or 0)
            for index in range(len(frames)):
                if not pipe.poll(_LIMIT_S):
                    yield self._lost(f"takes longer than {_LIMIT_S:.0f} s to decode", "E_READER_LIMIT")
                    return
                answer = json.loads(pipe.recv_bytes())
                if "code" in answer:
                    yield ReadError(answer["message"], code=answer["code"])
                else:
                    count = int(np.prod(answer["shape"]))
                    yield np.frombuffer(shared, answer["dtype"], count, index * slot).reshape(answer["shape"])
        except (EOFError, OSError):
            yield self._lost("its data crash the decoder", "E_READER_CRASH")
        finally:
            os.close(memory)

    def end(self) -> None:
        """Kill the process, whatever it is doing."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def _start(self) -> tuple[Connection[Any, Any], SpawnProcess]:
        if self._process is None or self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs,), daemon=True)
            with _without_main():
                self._process.start()
            theirs.close()
        return self._pipe, self._process

    def _lost(self, what: str, code: str) -> ReadError:
        self.end()
        return ReadError(f"{what}. The file is damaged or hostile; take the source.", code=code)


_CHILD = _Child()
atexit.register(dismiss)
os.register_at_fork(after_in_child=lambda: setattr(_CHILD, "lock", threading.Lock()))


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep the child from running the user's script, which need not be guarded against that just to read an image."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _is_loss(answer: np.ndarray[Any, Any] | ReadError) -> TypeGuard[ReadError]:
    return isinstance(answer, ReadError) and answer.code in {"E_READER_CRASH", "E_READER_LIMIT"}


def _checked(answer: np.ndarray[Any, Any] | ReadError, name: object) -> np.ndarray[Any, Any]:
    if isinstance(answer, ReadError):
        raise ReadError(f"{name}: {answer.message}", code=answer.code)
    return answer


def _slot_bytes(spec: Spec) -> int:
    size = spec.rows * spec.columns * spec.samples * _SLOT_ITEMSIZE
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _limit_memory(declared: int) -> None:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  no path object for the kernel's numbers
        present = int(file.read().split()[0]) * mmap.PAGESIZE
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = present + _LIMIT_BYTES + 2 * declared
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _attempt(data: bytes, spec: Spec) -> np.ndarray[Any, Any] | ReadError:
    """The picture, or the refusal of its data; native decoders raise errors of many kinds."""
    try:
        return _decode(data, spec)
    except ReadError as error:
        return error
    except MemoryError:
        return ReadError("needs more than 2 GiB to decode. The file is damaged or hostile.", code="E_READER_LIMIT")
    except Exception as error:
        return ReadError(
            f"compressed pixels do not decode ({type(error).__name__}). Take the source.", code="E_CODEC_DATA"
        )


def _decode(data: bytes, spec: Spec) -> np.ndarray[Any, Any]:
    import imagecodecs

    if spec.transfer_syntax in _RLE:
        return _run_lengths(data, spec)
    declared = _declared(data)
    if declared != (spec.rows, spec.columns, spec.samples):
        raise ReadError(
            f"compressed picture of {declared} rows, columns and values; the header says "
            f"{(spec.rows, spec.columns, spec.samples)}. Take the source.",
            code="E_CODEC_DATA",
        )
    if spec.transfer_syntax in _JPEG_2000:
        picture = imagecodecs.jpeg2k_decode(data, numthreads=1)
    elif spec.transfer_syntax in _JPEG_LS:
        picture = imagecodecs.jpegls_decode(data)
    else:
        space = "RGB" if spec.samples == 3 and _is_untouched(data, spec) else None
        picture = imagecodecs.jpeg8_decode(data, colorspace=space, outcolorspace=space)
    wanted = (spec.rows, spec.columns) if spec.samples == 1 else (spec.rows, spec.columns, spec.samples)
    if picture.shape != wanted or picture.dtype.kind not in "ui" or picture.dtype.itemsize > _SLOT_ITEMSIZE:
        raise ReadError(
            f"decodes to {picture.shape} values; {wanted} are needed. Take the source.", code="E_CODEC_DATA"
        )
    return np.ascontiguousarray(picture)


def _is_untouched(data: bytes, spec: Spec) -> bool:
    """Whether the decoder of a JPEG must leave three values as they are: without loss, or RGB by the header alone."""
    says_itself = any(mark in data[:_SIZ_WITHIN] for mark in (b"Adobe\0", b"JFIF\0"))
    return spec.transfer_syntax in _JPEG_LOSSLESS or (spec.photometric == "RGB" and not says_itself)


def _run_lengths(data: bytes, spec: Spec) -> np.ndarray[Any, Any]:
    import imagecodecs

    itemsize = spec.bits_allocated // 8
    segments = int.from_bytes(data[:4], "little")
    if segments != itemsize * spec.samples or itemsize not in {1, 2, 4}:
        raise ReadError(
            f"{segments} run-length segments; {itemsize * spec.samples} are needed. Take the source.",
            code="E_CODEC_DATA",
        )
    count = spec.rows * spec.columns * spec.samples
    planes = imagecodecs.dicomrle_decode(data, f"<u{itemsize}", out=count * itemsize)
    if len(planes) != count * itemsize:
        raise ReadError(
            f"{len(planes)} bytes of pixels; {count * itemsize} are needed. Take the source.", code="E_CODEC_DATA"
        )
    picture = np.frombuffer(planes, f"<u{itemsize}").reshape(spec.samples, spec.rows, spec.columns)
    return picture[0] if spec.samples == 1 else np.ascontiguousarray(picture.transpose(1, 2, 0))


def _declared(data: bytes) -> tuple[int, int, int]:
    """Rows, columns and values a pixel that a JPEG, JPEG-LS or JPEG 2000 codestream declares; zeros if none."""
    at = data.find(_SIZ, 0, _SIZ_WITHIN)
    if at >= 0 and len(data) >= at + 42:
        right, lower, left, upper = struct.unpack_from(">4I", data, at + 8)
        return lower - upper, right - left, int.from_bytes(data[at + 40 : at + 42], "big")
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF or marker in _STANDALONE_MARKERS:
            position += 1 if marker == 0xFF else 2
            continue
        if marker in _START_OF_FRAME:
            rows, columns = struct.unpack_from(">2H", data, position + 5)
            return rows, columns, data[position + 9]
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return 0, 0, 0
