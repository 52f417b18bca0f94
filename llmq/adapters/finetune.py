"""QLoRA: adapters trained on a frozen base in NF4 (Dettmers et al., 2023), or LoRA on the unquantized base.

PEFT makes the adapters, bitsandbytes the NF4 base and the 8-bit optimizer. The loop is our own because transformers'
Trainer keeps its checkpoints as pickles; it is short. Dropout is seeded by the step and the order of the rows by the
epoch, so a run that is resumed from a checkpoint gives the same adapter as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from llmq.adapters.base import nf4_config
from llmq.adapters.lora import CONFIG, RECORD, WEIGHTS
from llmq.adapters.settings import Outcome, Settings, card
from llmq.checkpoint import hub
from llmq.checkpoint.claim import FINGERPRINT, STATE, compare, refuse_foreign, take_lock
from llmq.checkpoint.files import write
from llmq.checkpoint.source import FolderSource, Source
from llmq.data.instructions import Example, Examples, read
from llmq.discovery.architecture import beside_decoder
from llmq.errors import LlmqError, first_line
from llmq.formats.bitsandbytes.source import is_nf4
from llmq.formats.dequantized import open_source, reads
from llmq.inference.pretrained import load_model, load_tokenizer
from llmq.machine import check_device, peak_memory, require
from llmq.planning.memory import check_writable
from llmq.training.curve import svg
from llmq.training.state import load, save
from llmq.training.steps import held_out_loss, loss_of, make_optimizer, mode, rate, split, steps_of
from llmq.watch import Silent

LOSSES = "loss.jsonl"
CURVE = "loss.svg"
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")


class Watch(Protocol):
    """Receives the progress of the run."""

    def stage(self, name: str, total: int) -> None: ...
    def step(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...


def finetune(
    model: str,
    data: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    *,
    eval_data: str | Path | None = None,
    save_every: int = 50,
    device: str = "cpu",
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> Outcome:
    """Train an adapter of a model folder, hub id or 'demo' on the rows of `data`, and write it to the folder `out`.

    `out` gets the adapter as PEFT reads it, finetune.json, loss.jsonl, loss.svg and a card. A checkpoint is written
    every `save_every` steps; if the run is killed, the same call resumes from the last one. Raises LlmqError.
    """
    settings, watch, out = settings or Settings(), watch or Silent(), Path(out)
    require("peft", "fine-tuning")
    check_device(device)
    check_writable(out)
    refuse_foreign(out)
    folder = hub.resolve(model, trust_remote_code=trust_remote_code)
    source: Source = FolderSource(folder, trust_remote_code, quantized_ok=True)
    if settings.base_bits == 4:
        require("bitsandbytes", "an NF4 base")
    _refuse_base(folder, source.config, settings)
    if not is_nf4(source.config):
        source = open_source(folder, trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    longest = _longest(folder, trust_remote_code)
    if longest is not None and longest < settings.seqlen:
        settings = replace(settings, seqlen=longest)
    train, held_out, notes = examples(tokenizer, settings, Path(data), None if eval_data is None else Path(eval_data))
    fingerprint = {
        "model": source.fingerprint(),
        "data": train.digest,
        "held-out data": held_out.digest,
        "settings": asdict(settings),
        "versions": {name: version(name) for name in VERSIONS if find_spec(name) is not None},
        "device": torch.device(device).type,
    }
    lock = _claim(out, fingerprint)
    try:
        if (out / RECORD).exists():
            watch.note(f"{out} is finished already: this is its record")
            return Outcome(**json.loads((out / RECORD).read_text(encoding="utf-8")))
        for note in notes:
            watch.note(note)
        run = _Run(model, source, settings, (train, held_out), out, device, watch)
        run.notes += notes
        run.train(save_every)
        return run.finish([str(Path(file).absolute()) for file in (data, eval_data) if file is not None])
    finally:
        os.close(lock)


def examples(
    tokenizer: Any, settings: Settings, data: Path, eval_data: Path | None
) -> tuple[Examples, Examples, list[str]]:
    """The training rows, the held-out rows, and notes on what was truncated. Raises LlmqError."""
    found = read(data, tokenizer, seqlen=settings.seqlen, template=settings.template)
    if eval_data is not None:
        held = read(eval_data, tokenizer, seqlen=settings.seqlen, template=settings.template)
        return found, held, [*found.notes, *held.notes]
    rows = sorted({example.row for example in found.all})
    count = round(settings.eval_share * len(rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    taken = {rows[i] for i in order[:count]}
    train = tuple(example for example in found.all if example.row not in taken)
    held_out = tuple(example for example in found.all if example.row in taken)
    if not train:
        raise LlmqError(f"{data} has {len(rows)} rows, and all of them are held out: lower --eval-share")
    notes = list(found.notes) + ([] if count else ["no rows are held out: only the training loss is measured"])
    return Examples(train, ()), Examples(held_out, ()), notes


class _Run:
    """One training run: the model with its adapter, the optimizer, and its progress."""

    def __init__(
        self,
        model: str,
        source: Source,
        settings: Settings,
        data: tuple[Examples, Examples],
        out: Path,
        device: str,
        watch: Watch,
    ) -> None:
        self.source, self.settings, self.out, self.device, self.watch = source, settings, out, device, watch
        self.train_rows, self.held_out = data[0].all, data[1].all
        self.notes: list[str] = []
        # A local model is recorded by its absolute path, so that the adapter can be used from any working directory.
        self.name = str(source.folder.absolute()) if model == "demo" or Path(model).exists() else model
        self.base = {"model": self.name, "fingerprint": source.fingerprint(), "bits": settings.base_bits}
        loaded = self._load()
        last, vocabulary = (
            max(max(row.ids) for part in data for row in part.all),
            loaded.get_input_embeddings().weight.shape[0],
        )
        if last >= vocabulary:
            raise LlmqError(
                f"{source.folder}: the tokenizer gives id {last}, but the model has {vocabulary} embeddings: they are "
                "of different models"
            )
        torch.manual_seed(settings.seed)
        self.model = self._adapted(loaded)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer, self.optimizer_name = make_optimizer(
            settings.optimizer, list(self.trained.values()), settings.lr, settings.weight_decay
        )
        size = settings.batch * settings.accumulate
        self.per_epoch = math.ceil(len(self.train_rows) / size)
        self.total = settings.steps or math.ceil(settings.epochs * self.per_epoch)
        self.tokens, self.seconds = 0, 0.0

    def _load(self) -> Any:
        """The base model; with base_bits 4 it is quantized to NF4 while loading, unless the checkpoint is NF4."""
        settings, quantization = self.settings, None
        if settings.base_bits == 4 and not is_nf4(self.source.config):
            quantization = nf4_config(self.source)
        own = self.source.config.get("dtype") or self.source.config.get("torch_dtype")
        model = load_model(
            self.source.folder,
            dtype="bfloat16" if settings.dtype == "auto" and own == "float16" else settings.dtype,
            device=self.device,
            trust_remote_code=self.source.trust_remote_code,
            quantization=quantization,
            probe=False,
            dense=True,
        )
        self.base["dtype"] = str(model.dtype).removeprefix("torch.")
        if settings.base_bits == 4:
            import bitsandbytes as bnb

            rounded = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
            if not rounded:
                raise LlmqError(
                    f"{self.source.folder} has no linear layer that bitsandbytes can quantize: use --base-bits 16"
                )
            for module in rounded.values():
                module.compute_dtype = model.dtype
            self.base["double_quant"] = all(m.weight.quant_state.nested for m in rounded.values())
            self.base["nf4"] = sorted(rounded)
        return model

    def _adapted(self, model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        settings = self.settings
        if settings.checkpointing and not model.supports_gradient_checkpointing:
            raise LlmqError(
                f"{self.source.folder}: transformers does not support gradient checkpointing for this model"
            )
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules="all-linear",
            # Rows are text alone, which never reaches a tower.
            exclude_modules=beside_decoder(model) or None,
            task_type="CAUSAL_LM",
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT uses names that transformers deprecates
                if settings.checkpointing:
                    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                adapted = get_peft_model(model, config)
        except ValueError as error:
            raise LlmqError(f"{self.source.folder}: PEFT cannot add an adapter: {first_line(error)}") from error
        adapted.peft_config["default"].base_model_name_or_path = self.name
        mode(adapted, True)
        return adapted

    def train(self, save_every: int) -> None:
        """Train from the last checkpoint, or from step 0, to the last step."""
        settings, state = self.settings, self.out / STATE
        about = load(state, self.trained, self.optimizer)
        begun = 0 if about is None else about["step"]
        if about is not None:
            self.tokens, self.seconds = about["tokens"], about["seconds"]
            self.watch.note(f"resuming from step {begun}")
        clock = time.perf_counter() - self.seconds
        losses = self.out / LOSSES
        kept = [] if about is None else [line for line in _lines(losses) if line["step"] <= begun]
        write(losses, "".join(json.dumps(line) + "\n" for line in kept))
        if about is None:
            self._measure(0)
            self._save(0)
        self.watch.stage("Training", self.total)
        for _ in range(begun):
            self.watch.step("")
        epoch, plan = -1, list[list[Example]]()
        for step in range(begun, self.total):
            if step // self.per_epoch != epoch:
                epoch = step // self.per_epoch
                plan = steps_of(self.train_rows, settings.batch * settings.accumulate, epoch, settings.seed)
            for group in self.optimizer.param_groups:
                group["lr"] = rate(step, self.total, settings.lr, settings.warmup, settings.schedule)
            torch.manual_seed(settings.seed * 1_000_003 + step)
            loss = self._step(plan[step % self.per_epoch])
            self._log({"step": step + 1, "loss": loss, "rate": self.optimizer.param_groups[0]["lr"]})
            self.seconds = time.perf_counter() - clock
            last = step + 1 == self.total
            if last or (step + 1) % self.per_epoch == 0:
                self._measure(step + 1)
            if last or (step + 1) % save_every == 0:
                self._save(step + 1)
            self.watch.step(f"loss {loss:.4f}")

    def _step(self, rows: Sequence[Example]) -> float:
        """One optimizer step on the mean loss over the rows' learned tokens; returns that loss. Raises LlmqError."""
        count = sum(sum(row.learn[1:]) for row in rows)
        total = 0.0
        for part in split(rows, self.settings.batch):
            loss, _ = loss_of(self.model, part, self.device)
            (loss / count).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(list(self.trained.values()), self.settings.clip)
        if not math.isfinite(total) or not bool(torch.isfinite(norm)):
            raise LlmqError(
                f"the loss or its gradient is not finite: start again in another folder with a lower --lr than "
                f"{self.settings.lr}, or --dtype float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens += count
        return total / count

    def _measure(self, step: int) -> None:
        if self.held_out:
            loss = held_out_loss(self.model, self.held_out, self.settings.batch, self.device)
            self._log({"step": step, "held_out": loss})

    def _log(self, line: dict[str, Any]) -> None:
        with (self.out / LOSSES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self, step: int) -> None:
        about = {"step": step, "tokens": self.tokens, "seconds": self.seconds}
        save(self.out / STATE, self.trained, self.optimizer, about)

    def finish(self, data: list[str]) -> Outcome:
        """Write the adapter, the loss curve and the card, then finetune.json, whose presence marks a finished run."""
        lines = _lines(self.out / LOSSES)
        training = [(float(line["step"]), float(line["loss"])) for line in lines if "loss" in line]
        measured = [(float(line["step"]), float(line["held_out"])) for line in lines if "held_out" in line]
        tail = training[-max(1, len(training) // 10) :]
        outcome = Outcome(
            base=self.base,
            data=data,
            settings=asdict(self.settings),
            optimizer=self.optimizer_name,
            rows=len({row.row for row in self.train_rows}),
            held_out=len({row.row for row in self.held_out}),
            steps=self.total,
            tokens=self.tokens,
            trained=sum(p.numel() for p in self.trained.values()),
            loss=sum(loss for _, loss in tail) / len(tail),
            before=measured[0][1] if measured else None,
            after=measured[-1][1] if measured else None,
            seconds=round(self.seconds, 2),
            peak_memory=peak_memory(),
            notes=self.notes,
        )
        made = self.out / STATE / "adapter"
        settled = self.model.peft_config["default"]
        for name in ("target_modules", "exclude_modules"):  # sets: their order differs between processes
            setattr(settled, name, sorted(getattr(settled, name) or ()) or None)
        self.model.save_pretrained(made, save_embedding_layers=False)
        for name in (WEIGHTS, CONFIG):
            write(self.out / name, (made / name).read_bytes())
        shutil.rmtree(made)
        write(self.out / CURVE, svg(training, measured))
        write(self.out / "README.md", card(outcome, self.out.absolute().name))
        write(self.out / RECORD, json.dumps(asdict(outcome), indent=1, sort_keys=True) + "\n")
        return outcome


def _lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of loss.jsonl: a killed run may leave a partial last line."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _longest(folder: Path, trust_remote_code: bool) -> int | None:
    """The model's maximum sequence length, or None if its config states none. Raises LlmqError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise LlmqError(f"{folder}: transformers cannot read its config: {first_line(error)}") from error
    names = [n for n in (*config.to_dict(), *config.attribute_map) if n.startswith("max_position")]
    limits = [value for value in (getattr(config, name) for name in names) if isinstance(value, int) and value > 0]
    return min(limits, default=None)


def _refuse_base(folder: Path, config: dict[str, Any], settings: Settings) -> None:
    """Raise LlmqError if the base's quantization does not match `settings.base_bits`."""
    section = config.get("quantization_config")
    if not section or reads(folder, config):
        return
    if not is_nf4(config):
        method = section.get("quant_method") if isinstance(section, dict) else section
        raise LlmqError(
            f"{folder} is quantized with {method}: adapters are trained on an unquantized model, one published in FP8 "
            "or FP4, or one that bitsandbytes quantized to NF4"
        )
    if settings.base_bits == 16:
        raise LlmqError(f"{folder} is in NF4: --base-bits 4 trains on it, --base-bits 16 needs the unquantized model")


def _claim(out: Path, fingerprint: dict[str, Any]) -> int:
    """Take the folder's lock and check that the folder belongs to this run; returns the lock. Raises LlmqError."""
    state = out / STATE
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LlmqError(f"cannot write to {out}: {error.strerror}; choose another folder") from error
    lock = take_lock(out)
    try:
        if (state / FINGERPRINT).exists():
            compare(out, json.loads(json.dumps(fingerprint)))
        else:
            refuse_foreign(out)
            write(state / FINGERPRINT, json.dumps(fingerprint, indent=2, sort_keys=True) + "\n")
    except BaseException:
        os.close(lock)
        raise
    return lock
