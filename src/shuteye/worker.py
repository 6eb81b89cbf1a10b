"""One rank: a model's runner, its arenas, and every verb that may be asked of it.

Knows nothing of scheduling, or of when to sleep; it does what plans say and reports what it measured.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from shuteye import __version__, native
from shuteye.cache.kv_layout import EPS as KV_EPS
from shuteye.config import EngineConfig
from shuteye.errors import CANARY_DISAGREES, ImageFailure, InternalError, InvalidRequest, VerificationFailed
from shuteye.memory.arena import Arena
from shuteye.memory.backends import MemoryBackend, open_backend
from shuteye.memory.image import WeightImage
from shuteye.memory.image_store import ImageStore
from shuteye.memory.precision import Precision
from shuteye.memory.residency import Residency
from shuteye.model_info import ModelSpec
from shuteye.models.binding import TOKENIZER_DIR, Origin
from shuteye.models.converter import Order, obtain_image
from shuteye.models.progress import LoggedProgress
from shuteye.models.rank_groups import RankGroups
from shuteye.parallel.shards import ONE_RANK, Part, RankPlace
from shuteye.state import RankIdentity, SleepPlan, TagReport, UpdateReport, WakePlan
from shuteye.tasks.canary import EPS, Canary, Numbers
from shuteye.tasks.canary_files import CanaryFile
from shuteye.tasks.table import Plan, Result, RunnerSetup, task_of_image

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

VERBS: Mapping[str, str] = {
    # what may be asked of a rank → the method that does it, from the worker down
    "identity": "identity",
    "facts": "facts",
    "tokenizer_files": "tokenizer_files",
    "weights_source": "weights_source",
    "allocate_kv_cache": "allocate_kv_cache",
    "estimate_sleep": "residency.estimate",
    "save": "residency.save",
    "abort_save": "residency.abort_save",
    "release": "release",
    "finish_release": "residency.finish_release",
    "estimate_wake": "residency.estimate_wake",
    "restore": "restore",
    "undo_restore": "residency.undo_restore",
    "reset": "reset",
    "verify": "residency.verify",
    "canary_agrees": "canary_agrees",
    "defer_canary": "defer_canary",
    "states": "residency.states",
    "epoch": "residency.epoch",
    "missing": "residency.missing",
    "residual_bytes": "backend.process_resident_bytes",
    "check_update": "check_update",
    "update_weights": "update_weights",
    "update_weights_from_file": "update_weights_from_file",
    "reload_weights": "reload_weights",
}


class Worker:
    """One rank's share of the model, loaded at construction; `execute` runs a step, `call` does the rest.

    Args:
        place: which rank this is.
        groups: the other ranks, if there are any.
        first_epoch: of its memory; more than what a rank in this place before it has reached.
        image_key: the image to serve, whatever has become of the checkpoint; another is made only if it is gone.

    Attributes:
        residency: the rank's memory: where it is, and how it gets elsewhere.
        backend: what that memory is taken from.

    Raises:
        ModelNotFound, UnsupportedModel, ImageFailure, MemoryExhausted: as their names say.
    """

    _canary: Canary  # from `allocate_kv_cache` on

    def __init__(
        self,
        config: EngineConfig,
        *,
        backend: MemoryBackend | None = None,
        place: RankPlace = ONE_RANK,
        groups: RankGroups | None = None,
        first_epoch: int = 0,
        image_key: str | None = None,
    ) -> None:
        self._config = config
        self._place = place
        num_threads = config.num_threads or max(1, len(os.sched_getaffinity(0)) // place.num_ranks)
        self.backend = backend or open_backend(config.memory_backend)
        self._num_updates = 0
        self._canary_deferred = False
        with ExitStack() as undo:
            self._image = image = self._open_image(config.model, image_key)
            undo.callback(image.close)
            self._version = self._image_version
            self._weights = Arena.reserve(self.backend, tag="weights", nbytes=image.layout.nbytes)
            self.residency = Residency(
                backend=self.backend,
                weights=self._weights,
                image=image,
                spill_dir=config.cache_dir / "spill",
                first_epoch=first_epoch,
            )
            undo.callback(self.residency.close)
            self.residency.restore(WakePlan(weights="reload"))
            setup = RunnerSetup(image, self._weights, config, num_threads, groups)
            self._runner = task_of_image(image).open_runner(setup)
            undo.pop_all()
        self._model = self._runner.model

    def call(self, verb: str, *args: Any) -> Any:
        """Do one of `VERBS`; the arguments and the result are those of the method that it names."""
        return attrgetter(VERBS[verb])(self)(*args)

    # --- loading --------------------------------------------------------------------------------

    def identity(self) -> RankIdentity:
        """Which process this is."""
        return RankIdentity(self._place.label, socket.gethostname(), os.getpid())

    def facts(self) -> ModelSpec:
        """What the engine sizes everything else from."""
        model = self._model
        facts = model.facts
        origin, held = Origin.of(self._image), Precision.of(self._image.layout)
        return ModelSpec(
            architecture=facts.architecture,
            task=facts.task,
            dtype=facts.dtype,
            vocab_size=facts.vocab_size,
            context_length=facts.context_length,
            eos_token_ids=model.eos_token_ids,
            weights_bytes=self._weights.nbytes,
            kv_bytes_per_token=self._runner.kv_bytes_per_token,
            available_bytes=self.backend.available_bytes(),
            image_dir=str(self._image.path),
            tokenizer_dir=str(self._image.path / TOKENIZER_DIR),
            default_sampling=model.default_sampling,
            pooling=model.pooling,
            speech=model.speech,
            source=origin.source,
            source_format=origin.source_format,
            weights_format=held.format,
            bits_per_weight=held.bits_per_weight,
            kv_cache_dtype=self._runner.kv_cache_dtype,
        )

    def tokenizer_files(self) -> dict[str, bytes]:
        """What is in `ModelSpec.tokenizer_dir`, for an engine that cannot read it: by name."""
        directory = self._image.path / TOKENIZER_DIR
        return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}

    def _open_image(self, model: str, key: str | None = None) -> WeightImage:
        if key is not None:
            try:
                return ImageStore(self._config.cache_dir).open_key(key)
            except ImageFailure as failure:
                logger.warning("%s The image is made again of %s.", failure.message, model)
        order = Order.of(self._config, self._place, model=model)
        return obtain_image(order, LoggedProgress())

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Reserve and commit the KV arena; its pages cost memory only once they are used. 0 blocks: it has no bytes."""
        nbytes = num_blocks * self._config.block_size * self._runner.kv_bytes_per_token
        arena = Arena.reserve(self.backend, tag="kv_cache", nbytes=nbytes)
        self.residency.attach_kv_cache(arena)
        self.residency.restore(WakePlan(kv_cache="commit"))
        self._runner.attach_kv_cache(arena, num_blocks=num_blocks)
        eps = max(EPS[self._model.dtype], KV_EPS.get(self._runner.kv_cache_dtype, 0.0))
        kept = CanaryFile(self._config.cache_dir, self._image.identity.key, self._computed_by())
        self._canary = Canary(self._runner.canary_pass, eps=eps, kept={self._image_version: kept})

    def _computed_by(self) -> str:
        """All that the canary's numbers depend on beside the image; what threads change is within its tolerance."""
        kernels = self._config.kernels
        library = native.identity() if kernels != "torch" and native.available() else "torch"
        return f"{__version__} {library} {kernels} {self._runner.kv_cache_dtype} {self._config.block_size}"

    # --- a step ---------------------------------------------------------------------------------

    def execute(self, plan: Plan) -> Result:
        """Run one step of the model; the result goes with the plan's type.

        Raises:
            InternalError: a tag is not resident, or the plan is of another epoch; nothing was computed.
            VerificationFailed: the canary that went with it disagrees and nothing was sampled, or somebody wrote to the
                image; nothing of the step may be used.
        """
        if not self.residency.all_resident:
            raise InternalError("A step was planned while memory is not resident; the gate should have been closed.")
        rank, num_ranks = self._place.rank, self._place.num_ranks
        if len(plan.epoch) != num_ranks or plan.epoch[rank] != self.residency.epoch():
            raise InternalError(
                f"A step builds on epoch {plan.epoch} of the memory of {num_ranks} ranks; that of rank {rank} is in "
                f"epoch {self.residency.epoch()}."
            )
        self._require_intact()  # before, because the pages of a file cut short cannot be touched
        result = self._runner.execute(plan, prove=self._prove if self._canary_deferred else None)
        self._require_intact()
        return result

    def _require_intact(self) -> None:
        try:
            self.residency.require_intact()
        except ImageFailure as failure:
            raise VerificationFailed(failure.message) from failure

    def _prove(self, numbers: Numbers) -> None:
        if not self._canary.knows(numbers, self._version):
            raise VerificationFailed(CANARY_DISAGREES)
        self._canary_deferred = False

    # --- sleep and wake -------------------------------------------------------------------------

    def release(self, plan: SleepPlan) -> tuple[TagReport, ...]:
        """Give the memory back; on error the rank's state is unknown until `reset`."""
        self._runner.drop_computed()
        self._canary_deferred = False
        return self.residency.release(plan)

    def restore(self, plan: WakePlan) -> tuple[TagReport, ...]:
        """Map and fill memory; on error the rank is as it was before."""
        self._canary_deferred = False  # of a wake that was undone, because another rank could not defer its own
        reports = self.residency.restore(plan)
        if plan.weights == "reload":
            self._enter_version(self._image_version)
        return reports

    def reset(self) -> None:
        """The way back from a fault: release everything again, whatever happened before."""
        self._canary_deferred = False
        self.residency.reset()

    def canary_agrees(self) -> bool:
        """Run the canary; see `Canary.agrees`.

        Raises:
            VerificationFailed: somebody wrote to the image.
        """
        self._require_intact()
        return self._canary.agrees(self._version)

    def defer_canary(self) -> None:
        """Let the canary go with the next step; nothing comes of the step if it disagrees."""
        self._canary_deferred = True

    def weights_source(self) -> str:
        """Which weights are loaded: the whole model's image's key, and how often they were updated since."""
        return self._version

    @property
    def _image_version(self) -> str:
        """The same on every rank whose image is of the same checkpoint."""
        return replace(self._image.identity, shard="").key

    # --- weights --------------------------------------------------------------------------------

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> UpdateReport:
        """Write tensors by their checkpoint names, cast to the model's dtype, one after the other.

        Raises:
            InvalidRequest: an unknown name or a wrong shape; tensors before it have been written.
            VerificationFailed: somebody wrote to the image that is mapped; nothing has been written.
        """
        self._require_intact()
        try:
            return self._write(named_tensors)
        finally:
            self.residency.watch.note_written()

    def _write(self, named_tensors: Iterable[tuple[str, Tensor]]) -> UpdateReport:
        from shuteye.models.weight_updates import write_tensor  # torch: only who updates needs it

        begin = time.perf_counter()
        updated = updated_bytes = 0
        for name, tensor in named_tensors:
            try:
                slot_name, part = self._target(name, tuple(tensor.shape))
            except InvalidRequest as error:
                message = f"{error.message.removesuffix('.')} ({updated} were written)."
                raise InvalidRequest(message, param=name) from error
            if updated == 0:
                self._num_updates += 1
                self._enter_version(f"{self._image_version}+{self._num_updates}")
            if slot_name is not None:
                slot = self._image.layout.slots[slot_name]
                write_tensor(self._weights, slot, tensor[part])
                self.residency.mark_written(slot_name)
                updated_bytes += slot.nbytes
            updated += 1
        return UpdateReport(updated, updated_bytes, self.residency.missing(), time.perf_counter() - begin)

    def _target(self, name: str, shape: tuple[int, ...]) -> tuple[str | None, Part]:
        """The slot to which a tensor of the checkpoint goes, and which part of it; no slot if other ranks have it all.

        Raises:
            InvalidRequest: an unknown name, a wrong shape, or a matrix that is quantized.
        """
        shard = self._model.shard
        if shard is not None:
            part = shard.part_of(name, shape)
            return (None, ()) if part is None else (self._writable(name), part)
        if name not in self._model.slot_names:
            raise InvalidRequest(f"{name!r} is not a tensor of this model.", param=name)
        slot_name = self._writable(name)
        expected = self._image.layout.slots[slot_name].shape
        if shape != expected:
            raise InvalidRequest(f"{name!r} has shape {shape}, expected {expected}.", param=name)
        return slot_name, ()

    def _writable(self, name: str) -> str:
        """The slot of a tensor that can be written as it is given.

        Raises:
            InvalidRequest: it would have to be rounded to few bits.
        """
        slot = self._image.layout.slots[self._model.slot_names[name]]
        if slot.matrix_kind.is_quantized:
            raise InvalidRequest(
                f"{name!r} is held as {slot.kind}, and what is written to it would be rounded to that. Serve the model "
                "with --quantization none to update it, or reload weights from a checkpoint of the same bits.",
                param=name,
            )
        return slot.name

    def check_update(self, path: str) -> None:
        """Read what the tensors of a file, or of all of a directory, are called, and whether they could be written.

        Raises:
            InvalidRequest: there is no such file, an unknown name or a wrong shape.
            VerificationFailed: somebody wrote to the image that is mapped.
        """
        from shuteye.models.weight_updates import open_shapes

        self._require_intact()
        with open_shapes(path) as named_shapes:
            for name, shape in named_shapes:
                self._target(name, shape)

    def update_weights_from_file(self, path: str, number: int | None = None) -> UpdateReport:
        """`update_weights` with every tensor of a safetensors file, or of all of a directory.

        Args:
            number: which update of the engine this is; ranks that were started later cannot count.
        """
        from shuteye.models.weight_updates import open_tensors

        if number is not None:
            self._num_updates = number - 1
        with open_tensors(path) as named_tensors:
            return self.update_weights(named_tensors)

    def reload_weights(self, path: str | None) -> UpdateReport:
        """Replace every weight by those of the image, or of another checkpoint of the same model.

        Raises:
            InvalidRequest: the checkpoint differs in more than the values of its weights; nothing has changed.
            ImageFailure: the image, or the checkpoint's, is damaged; nothing has changed.
            ShuteyeError: mapping failed; the weights are discarded and `wake_up` brings them back.
        """
        begin = time.perf_counter()
        if path is not None:
            self._replace_image(path)
        self._image.require_intact()
        self.residency.release(SleepPlan(weights="discard"))
        self.restore(WakePlan(weights="reload"))
        return UpdateReport(len(self._image.layout.slots), self._image.layout.nbytes, (), time.perf_counter() - begin)

    def _replace_image(self, path: str) -> None:
        from shuteye.models.weight_updates import refuse_other_model

        image = self._open_image(path)
        try:
            refuse_other_model(self._image, image)
            self.residency.replace_image(image)
        except BaseException:
            image.close()
            raise
        self._image = image

    def _enter_version(self, version: str) -> None:
        """The weights are, or are about to be, others: the canary keeps its record only of the image they reload to."""
        if self._version not in (version, self._image_version):
            self._canary.forget(self._version)
        self._version = version

    # --- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back every arena and image; views of them must not be used any more."""
        self.residency.close()
