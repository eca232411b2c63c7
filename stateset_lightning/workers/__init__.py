"""What rewards and environments need to run foreign code and foreign models: killable processes, a chat client."""

from stateset_lightning.workers.openai_client import OpenAIClient
from stateset_lightning.workers.pool import WorkerDied, WorkerPool
from stateset_lightning.workers.process import forked_child_ends

__all__ = ["OpenAIClient", "WorkerDied", "WorkerPool", "forked_child_ends"]
