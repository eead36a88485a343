"""transformers' own Trainer trains the model, with weight decay where it belongs."""

import torch
from transformers import Trainer, TrainingArguments

from modeling_fambav import FambaVForImageClassification
from support.helpers import random_tensor, tiny_config


class FambaVTrainer(Trainer):
    """As the documentation has it."""

    def get_decay_parameter_names(self, model) -> list[str]:
        return model.decayed_parameters()


def images() -> list[dict]:
    """Two classes that differ in brightness."""
    noise = random_tensor(32, 3, 16, 16, seed=0)
    return [{"pixel_values": noise[index] + 2 * (index % 2) - 1, "labels": index % 2} for index in range(32)]


def test_trainer_learns_and_decays_what_is_to_be_decayed(tmp_path):
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config())
    arguments = TrainingArguments(
        tmp_path,
        max_steps=12,
        per_device_train_batch_size=16,
        learning_rate=0.01,
        weight_decay=0.3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = FambaVTrainer(model, arguments, train_dataset=images(), eval_dataset=images())
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.evaluate()["eval_loss"] < 0.5 * losses[0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in trainer.optimizer.param_groups
        if group["weight_decay"] == 0.3
        for parameter in group["params"]
    }
    assert decayed == set(model.decayed_parameters())
    assert "fambav.layers.0.mixer.in_proj.weight" in decayed
    spared = ("A_log", ".D", "cls_token", "position_embeddings", "norm.weight", ".bias")
    assert not any(name.endswith(spared) for name in decayed)
