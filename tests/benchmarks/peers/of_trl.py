"""TRL's DPOTrainer, for tests/benchmarks/train_step.py; runs in an environment with TRL alone.

With the argument "precomputed" the reference's log-probs are computed once, before training, else
in each step.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer
from turns import Turns


class OfIds(DPOTrainer):
  """DPOTrainer on token ids, in the order given, that keeps its losses."""

  def _prepare_dataset(self, dataset, *_, **__):
    return dataset

  def _get_train_sampler(self, dataset=None):
    return SequentialSampler(dataset or self.train_dataset)

  def compute_loss(self, *args, **options):
    loss = super().compute_loss(*args, **options)
    self.last_loss = loss.item()
    return loss


class Clock(TrainerCallback):
  """Steps when the benchmark asks for one."""

  def __init__(self, turns: Turns):
    self.turns, self.trainer = turns, None

  def on_train_begin(self, args, state, control, **_):
    self.turns.wait()

  def on_step_begin(self, args, state, control, **_):
    self.turns.start()

  def on_step_end(self, args, state, control, **_):
    self.turns.done(self.trainer.last_loss)
    control.should_training_stop = not self.turns.wait()


def main():
  turns = Turns()
  batch, settings = turns.batch, turns.batch["optimizer"]
  examples = [
    {"prompt_ids": x["context"], "chosen_ids": x["chosen"], "rejected_ids": x["rejected"]}
    for x in batch["examples"]
  ]
  config = DPOConfig(
    output_dir=tempfile.mkdtemp(),
    beta=batch["beta"],
    precompute_ref_log_probs="precomputed" in sys.argv[2:],
    max_length=None,
    model_init_kwargs={"dtype": torch.float32},
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=batch["remat"],
    per_device_train_batch_size=len(examples),
    max_steps=1 << 20,
    learning_rate=settings["learning_rate"],
    lr_scheduler_type="constant",
    optim="adamw_torch",
    adam_beta1=settings["b1"],
    adam_beta2=settings["b2"],
    adam_epsilon=settings["epsilon"],
    weight_decay=settings["weight_decay"],
    max_grad_norm=settings["clip_norm"],
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
  )
  # Nothing is tokenised; the trainer wants to know of a padding token.
  words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
  clock = Clock(turns)
  trainer = clock.trainer = OfIds(
    model=str(turns.directory / "weights"),
    args=config,
    train_dataset=Dataset.from_list(examples),
    processing_class=tokenizer,
    callbacks=[clock],
  )
  padded = trainer.data_collator(examples)
  found = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, padded)
  turns.tell(log_probs=torch.stack(found, dim=1).tolist())
  trainer.train()


if __name__ == "__main__":
  main()
