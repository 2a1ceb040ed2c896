"""How far a run has come, in one line of whatever width."""

from __future__ import annotations

from fedex_lora.errors import number

_SHORTEST = 6  # characters of a client's name
_BAR = 24, 2  # characters of the bar, at most and at least


class Pace:
    """Rounds, clients, loss and time left, from what a watcher is told.

    Args:
        rounds: Of the run; 0 if that is not known.
        clients: Of a round.
        done: Rounds that were done before.
        now: Seconds of a clock.
    """

    def __init__(self, rounds: int, clients: int, done: int, now: float) -> None:
        self.rounds, self.clients, self.first, self.began = rounds, max(clients, 1), done, now
        self.done = done
        self.loss: float | None = None
        self._next()

    def _next(self) -> None:
        self.finished, self.turn_of, self.steps = 0, "", (0, 1)

    def turn(self, client: str, done: int, total: int, loss: float | None) -> None:
        """As `Watcher.turn` is told."""
        self.loss = self.loss if loss is None else loss
        if not client:
            self.finished, self.clients, self.turn_of = done, max(total, 1), ""
            return
        if client != self.turn_of:
            self.finished += self._together() if self.turn_of else 0
            self.turn_of = client
        self.steps = done, max(total, 1)

    def round_done(self, round: int) -> None:
        self.done = round
        self._next()

    def _together(self) -> int:
        """How many clients are trained in one pass, by their names."""
        return len(self.turn_of.split(", "))

    def share(self) -> float:
        """Of the rounds that there are to be, how much is done, since this began."""
        part = self.finished / self.clients
        if self.turn_of:
            part += self._together() * self.steps[0] / self.steps[1] / self.clients
        done = self.done - self.first + min(part, 1.0)
        return min(done / max(self.rounds - self.first, 1), 1.0)

    def left(self, now: float) -> str:
        """Time that is left if it goes on as so far."""
        share = self.share()
        if not self.rounds or not share:
            return "-:--"
        minutes, seconds = divmod(round((now - self.began) * (1 - share) / share), 60)
        hours, rest = divmod(minutes, 60)
        return f"{hours}:{rest:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def line(self, now: float, width: int, bar: bool = True) -> str:
        """All that there is room for: whose turn it is gives way first, then the bar.

        Example:
            >>> pace = Pace(5, 3, 0, 0.0)
            >>> pace.line(0.0, 60)
            'round 1/5  clients 0/3  -:-- left  ························'
            >>> pace.turn("ann", 5, 10, 0.71828)
            >>> pace.line(2.0, 60)
            'round 1/5  clients 0/3  ann 5/10  loss 0.718  0:58 left  ···'
        """
        at = min(self.done + 1, self.rounds or self.done + 1)
        of = f"/{self.rounds}" if self.rounds else ""
        most = self.finished
        if self.turn_of and self.steps[0] >= self.steps[1]:
            most += self._together()
        head = [f"round {at}{of}", f"clients {min(most, self.clients)}/{self.clients}"]
        tail = [] if self.loss is None else [f"loss {number(self.loss, 3)}"]
        tail.append(f"{self.left(now)} left")
        text = "  ".join([*head, *tail])
        if self.turn_of:
            steps = f" {self.steps[0]}/{self.steps[1]}"
            room = width - len(text) - 2 - len(steps)
            name = self.turn_of
            if len(name) > room:
                name = name[: room - 1] + "…"
            if room >= min(_SHORTEST, len(self.turn_of)):
                text = "  ".join([*head, name + steps, *tail])
        room = min(_BAR[0], width - len(text) - 2)
        if room < _BAR[1] or not bar:
            return text[:width]
        full = int(self.share() * room)
        return f"{text}  {'━' * full}{'·' * (room - full)}"
