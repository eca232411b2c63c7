"""Environments as TRL's `environment_factory` takes them, written to its documented interface."""

import sqlite3


class GuessEnvironment:
    """A number is to be guessed. Its state is in a database, whose connection is bound to the thread that opened it."""

    def reset(self, **kwargs) -> str | None:
        self.columns = kwargs
        self.database = sqlite3.connect(":memory:")
        self.database.execute("CREATE TABLE guesses (number INTEGER)")
        return f" Between 1 and {kwargs['highest']}."

    def guess(self, number: int) -> str:
        """Guesses the number.

        Args:
            number: The guess.

        Returns:
            Whether it is higher, lower, or right.
        """
        if self._is_over():
            raise ValueError("the game is over")
        self.database.execute("INSERT INTO guesses VALUES (?)", (number,))
        secret = self.columns["secret"]
        return "right" if number == secret else "higher" if number < secret else "lower"

    def get_reward(self) -> float:
        count = self.database.execute("SELECT COUNT(*) FROM guesses").fetchone()[0]
        return 1 / count if self._is_over() else 0.0

    @property
    def broken(self):
        raise RuntimeError("a property that nobody asked for")

    def _is_over(self) -> bool:
        found = self.database.execute("SELECT 1 FROM guesses WHERE number = ?", (self.columns["secret"],))
        return found.fetchone() is not None


class EchoEnvironment:
    """With an async tool and an async reward, and a reset that says nothing."""

    def reset(self, prompt, topic=None) -> None:
        self.seen = {"prompt": prompt, "topic": topic}
        self.said = []

    async def echo(self, text: str) -> str:
        """Repeats a text.

        Args:
            text: To repeat.
        """
        self.said.append(text)
        return text

    async def get_reward(self) -> float:
        return float(len(self.said))
