"""What foreign code and foreign models need: killable processes, a fork with limits, a chat client."""

from stateset_lightning.workers.instructions import Instructions
from stateset_lightning.workers.limits import limited, rendered
from stateset_lightning.workers.openai_client import OpenAIClient
from stateset_lightning.workers.pool import WorkerDied, WorkerPool

__all__ = ["Instructions", "OpenAIClient", "WorkerDied", "WorkerPool", "limited", "rendered"]
