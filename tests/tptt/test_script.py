"""TPTT's documented scripts, line by line, in a process of their own.

What differs from the documentation: the import, a local folder in place of names on the hub, a stand-in for the
datasets library, values for the names that the documentation leaves to the reader, and use_cpu, without which
transformers refuses bf16 where there is no GPU.
"""

import subprocess
import sys

import pytest
from tptt.backbones import folder_with_tokenizer

pytest.importorskip("peft")

# A module `datasets` beside the script: columns of texts with the three methods that the script calls.
DATASETS = """
class Dataset:
    pass  # transformers looks for the name


class Table(list):
    @property
    def column_names(self):
        return list(self[0])

    def select(self, numbers):
        return Table(self[i] for i in numbers)

    def map(self, function, batched, remove_columns):
        columns = function({name: [row[name] for row in self] for name in self.column_names})
        count = len(columns["input_ids"])
        return Table({name: values[i] for name, values in columns.items()} for i in range(count))


def load_dataset(name):
    def row(i):
        return {"instruction": f"Count to {i % 7}.", "input": "" if i % 2 else "On.", "output": "1 2 3 4"[: i % 7 + 1]}

    return {"train": Table(row(i) for i in range(1000))}
"""

TRAIN = """
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, AutoModelForCausalLM
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from fastweight import tptt

base_model_name = base_tokenizer_name = "BACKBONE"
hf_token, N, EPOCH = None, 412, 1
backbone = AutoModelForCausalLM.from_pretrained(base_model_name)

##### Peft parameters

target_modules = ["q_proj","k_proj","v_proj","o_proj"]  # Llama, Mistral, OLMo. Minimal : q_proj, v_proj

lora_config = LoraConfig(
    r=8,
    lora_alpha=16,
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
    target_modules=target_modules,
).to_dict()

##### Transforming into Titans (Tptt)
config = tptt.TpttConfig(
    base_model_name=base_model_name,
    lora_config=lora_config,
)

model = MODEL
model.backbone.print_trainable_parameters()

##### Preprocessing

tokenizer = AutoTokenizer.from_pretrained(base_tokenizer_name, token=hf_token)
# Ensure the tokenizer has a padding token for batching
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token or "[PAD]"

raw_dataset = load_dataset("yahma/alpaca-cleaned")["train"].select(range(N))

def preprocess_fn(samples):
    prompts = [
        f"{instr}\\n{inp}" if inp else instr
        for instr, inp in zip(samples["instruction"], samples["input"])
    ]
    # Optionally, append output for supervised fine-tuning
    prompts = [f"{p}\\n{out}" for p, out in zip(prompts, samples["output"])]
    tokens = tokenizer(
        prompts,
        truncation=True,
        max_length=512, #256,
        padding="longest", #padding= "max_length",
        return_attention_mask=True,
    )
    tokens["labels"] = tokens["input_ids"].copy()
    return tokens

tokenized_dataset = raw_dataset.map(
    preprocess_fn, batched=True, remove_columns=raw_dataset.column_names
)

data_collator = DataCollatorForLanguageModeling(
    tokenizer=tokenizer,
    mlm=False,
)

# Define HuggingFace TrainingArguments for reproducible training
training_args = TrainingArguments(
    output_dir="./tptt_output",
    per_device_train_batch_size=4, # per_device_train_batch_size * N GPU --> VRAM limit risk
    num_train_epochs=EPOCH,
    learning_rate=5e-4,
    max_grad_norm=1.0, # gradient clipping
    use_cpu=not torch.cuda.is_available(),
    bf16=True,  # Use mixed precision if supported by hardware (underflow gradient)
    ddp_find_unused_parameters=False,
    logging_steps=5,
    save_total_limit=2,  # Limit HDD
    seed=42,
    save_strategy="epoch",
    report_to="tensorboard",
)

# LiZA MaG callback
initial_weight=0.01,
final_weight=0.5,
transition_step=100,
liza_callback = tptt.AdjustMaGWeightCallback(
            model,
            initial_weight=initial_weight,
            final_weight=final_weight,
            transition_step=transition_step,)

trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=tokenized_dataset,
    data_collator=data_collator,
    processing_class=tokenizer,
    callbacks=[liza_callback],
)

trainer.train()
"""

AFTER = """
trainer.save_model("./saved")
history = trainer.state.log_history
losses = [entry["loss"] for entry in history if "loss" in entry]
assert losses[-1] < losses[0] - 0.5, losses
assert history[0]["mag_weight"] < 0.04 and history[-1]["mag_weight"] == 0.5, history
# The Trainer has left its autocast around model.forward; the backbone computes with the same weights, without it.
torch.save({"logits": model.eval().backbone(torch.arange(24).view(2, 12)).logits.detach()}, "logits.pt")
"""

INFER = """
import torch
from transformers import AutoTokenizer, AutoModelForCausalLM
from fastweight import tptt

repo_id, hf_token = "FOLDER", None

# Import model and tokenizer
model_tptt = AutoModelForCausalLM.from_pretrained(repo_id, token=hf_token, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repo_id)

# Prepare for inference
device = 0 if torch.cuda.is_available() else -1
model_tptt.to(f"cuda:{device}" if device != -1 else "cpu")

model_tptt.eval()
pipe = tptt.TpttPipeline(model=model_tptt, tokenizer=tokenizer, device=device)

# Generate text
result = pipe("Bonjour, I'm Fabien Furfaro,", max_new_tokens=100)
print(result[0]["generated_text"])

count = len(tokenizer(result[0]["generated_text"]).input_ids)
assert result[0]["generated_text"].startswith("Bonjour, I'm Fabien Furfaro,"), result
assert type(model_tptt) is tptt.TpttModel
logits = torch.load("LOGITS", weights_only=True)["logits"]
assert torch.equal(model_tptt(torch.arange(24).view(2, 12)).logits, logits)
"""


def run(script, folder, monkeypatch):
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
    (folder / "datasets.py").write_text(DATASETS)
    (folder / "script.py").write_text("import torch\ntorch.set_num_threads(1)\n" + script)
    command = [sys.executable, str(folder / "script.py")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LINES = ['tptt.TpttModel(config, attn_implementation="eager")', "tptt.TpttModel(config, backbone=backbone)"]


@pytest.mark.parametrize("line", LINES)
def test_the_documented_training_and_inference_run_line_by_line(tmp_path, monkeypatch, line):
    backbone = folder_with_tokenizer(tmp_path / "backbone")
    script = TRAIN.replace("BACKBONE", str(backbone)).replace("MODEL", line, 1)
    said = run(script + AFTER, tmp_path / "train", monkeypatch)
    assert "trainable params" in said
    saved, logits = tmp_path / "train" / "saved", tmp_path / "train" / "logits.pt"
    said = run(INFER.replace("FOLDER", str(saved)).replace("LOGITS", str(logits)), tmp_path / "elsewhere", monkeypatch)
    assert said.startswith("Bonjour, I'm Fabien Furfaro,")
