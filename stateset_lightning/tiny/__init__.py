"""The bundled model: one million parameters that answer two-operand arithmetic rightly about four times in ten.

Good enough to learn from reward and bad enough to improve, so that every config, example and test runs offline. `tiny`
as a model name stands for this folder. `scripts/make_tiny.py` of the repository makes it anew, from nothing,
in a few minutes.
"""

from pathlib import Path

# Folder of the bundled model, as `save_pretrained` writes it.
TINY_FOLDER = Path(__file__).parent / "model"
