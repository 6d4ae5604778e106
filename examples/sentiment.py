"""From data to prediction: train a sentiment classifier and ask it about two new sentences.

Run it with `python examples/sentiment.py`. It takes about a quarter of a minute on one core and downloads nothing: the
film reviews are synthetic, and the backbone is the small BERT that comes with lit_spu. For real data and a real
model, change `SOURCE` to "hub" (or a folder with GLUE's files) and `BACKBONE` to "distilbert-base-uncased".
"""

from __future__ import annotations

import tempfile
from typing import Any

from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import lit_spu
from lit_spu import GLUE, LoRA, MetricProgressBar

SOURCE = "sample"
BACKBONE = "mini-bert"
SENTENCES = ("A truly funny film.", "The plot is dull and the actors are awful.")


def main(folder: str) -> list[str]:
    """Train, validate and predict; return the predicted label of each sentence. All files go into `folder`."""
    # 1. Data: examples with named fields and a label. They are tokenised for the backbone of the model.
    seed_everything(42)
    data = GLUE(task="sst2", source=SOURCE, batch_size=32)
    for example in data.examples("train")[:3]:
        print(f"  {example['sentence']!r} -> {data.task.labels[example['label']]}")

    # 2. Method: the backbone is frozen, and LoRA trains two narrow matrices at every linear layer of a block.
    model = LoRA(backbone=BACKBONE, task="sst2", rank=4, lr=1e-3)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained")

    # 3. Training: an ordinary Lightning Trainer. The checkpoint with the best validation accuracy is saved.
    best = ModelCheckpoint(f"{folder}/checkpoints", monitor="val/accuracy", mode="max")
    trainer = Trainer(
        max_epochs=3,
        callbacks=[best, MetricProgressBar()],
        logger=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)

    # 4. Validation: the checkpoint holds the trained weights only; `load` adds the backbone.
    loaded = lit_spu.load(best.best_model_path)
    scores = trainer.validate(loaded, data, verbose=False)[0]
    print(f"validation accuracy: {scores['val/accuracy']:.3f}")

    # 5. Prediction: new sentences instead of a split.
    labels = []
    for sentence in SENTENCES:
        new = GLUE(task="sst2", text=sentence)
        predictions: Any = trainer.predict(loaded, new)  # one dict for each batch
        (output,) = predictions
        labels.append(data.task.labels[int(output["prediction"])])
        print(f"  {sentence!r} -> {labels[-1]} ({float(output['scores'].max()):.2f})")
    return labels


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(scratch)
