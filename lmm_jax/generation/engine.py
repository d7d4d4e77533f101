"""Many requests as one batch: each is read when a row is free, and all rows decode together, a few tokens a time.

    waiting     requests, in the order in which they came
      │  pictures.py    their pictures are encoded, once each
      │  prefixes.py    what of a prompt was read before is not read again
      │  programs.py    `read` and `put`: the prompt goes into a free row of the batch
    rows        unlike prompts, budgets, limits and options of sampling side by side
      │  programs.py    `decode`: some tokens in every row
      │  requests.py    ids become text; a row whose answer has ended is free for the next request
    answers

Sizes are rounded up to few values, so that few programs are compiled: rows to one or a power of two from four on,
positions to two values for each doubling. With the lengths of a model of n positions that makes at most ⌈log₂ n⌉.
"""

import collections
import contextlib
import itertools
import threading

import numpy as np

from lmm_jax import free_memory, sharding, storage
from lmm_jax.data.questions import pad_questions
from lmm_jax.generation.pictures import Pictures, bucket
from lmm_jax.generation.prefixes import Prefixes, begin
from lmm_jax.generation.programs import CHUNK, Programs
from lmm_jax.generation.sampling import Options

READ = 1024  # positions of prompts that are read together in a row; a longer prompt is read alone
EAGER = 4  # tokens at a time, where somebody reads the answer as it comes
MOST_ROWS = 128
SHORTEST_ROW = 128  # positions


class Engine:
    """Answers requests, those of several threads together.

    Attributes:
      programs: the compiled `Programs`.
      pictures: what was seen, `Pictures`.
      end: id that ends an answer.
    """

    def __init__(self, program, params, layout, end):
        """For the `Program` of a model, its parameters, its `PackLayout`, and the id that ends an answer."""
        self._program, self.end = program, end
        self.programs = Programs(program, params)
        self.pictures = Pictures(program, self.programs, params, layout)
        self._free_bytes = free_memory.of_mesh(program.mesh)
        self._prefixes = Prefixes(self._free_bytes // 8)
        # Again by a stream that is closed as garbage while its thread is in here: that only marks its request.
        self._lock = threading.RLock()
        self._waiting = collections.deque()
        self._state, self._rows = None, []  # the device's `Rows`, and the request in each

    def run(self, requests, at_a_time=None, give_errors=False):
        """Answers `requests`, `at_a_time` of them together, as many as there is memory for if None.

        Args:
          requests: iterable of `Request`s, of which no more than `at_a_time` are asked for ahead.
          at_a_time: int or None.
          give_errors: yield a request that something is wrong with, with its `error`, instead of raising it.

        Yields:
          each `Request` whenever something has come of it; the last time it is `done`.

        Raises:
          Whatever is wrong with one of them, such as a picture that cannot be read; the others are given up.
        """
        left, mine = iter(requests), []
        try:
            while True:
                new = list(itertools.islice(left, None if at_a_time is None else at_a_time - len(mine)))
                mine += new
                if not mine:
                    break
                with self._lock:
                    self._waiting += new
                    if not any(request.news for request in mine):
                        self._step()
                for request in [request for request in mine if request.news]:
                    if request.error is not None and not give_errors:
                        raise request.error
                    request.news = False
                    yield request
                mine = [request for request in mine if not request.done]
        finally:
            with self._lock:
                for request in mine:
                    request.reason = request.reason or "given up"
                if all(request is None or request.done for request in (*self._rows, *self._waiting)):
                    self._state, self._rows = None, []  # others need the memory

    def _step(self):
        """Reads what there is room for, and decodes some tokens of every row; a fault ends all requests."""
        try:
            self._admit_and_decode()
        except BaseException as error:
            for request in (*self._rows, *self._waiting):
                if request and not request.done:
                    request.fail(error)
            self._state, self._rows = None, []
            self._waiting.clear()
            raise

    def _admit_and_decode(self):
        self._rows = [request if request and not request.done else None for request in self._rows]
        self._waiting = collections.deque(request for request in self._waiting if not request.done)
        if not any(self._rows):
            self._state, self._rows = None, []
        self._make_room()
        self._admit()
        if not any(self._rows):  # none that waited can be answered
            return
        alive = np.array([request is not None for request in self._rows])
        found = self.programs.decode(self._state, self._steps(), self.end, alive)
        self._state, ids, logprobs = found[0], np.asarray(found[1]), np.asarray(found[2])
        for row, request in enumerate(self._rows):
            if request:
                count = int((ids[row] >= 0).sum())
                request.take(ids[row, :count].tolist(), logprobs[row, :count].tolist(), self.end)

    def _steps(self):
        """Tokens to decode before requests are looked at again."""
        live = [request for request in self._rows if request]
        if any(request.eager and not request.ids for request in live):
            return 1
        if any(request.eager for request in live):
            return EAGER
        # Rows that end at their limit are given to those that wait as soon as they end.
        first = min(request.limit - len(request.ids) for request in live)
        return min(CHUNK, first) if self._waiting else CHUNK

    def _make_room(self):
        """Rows for the requests that wait, as far as there is memory, and positions for the longest of them."""
        wanted = [request for request in self._rows if request] + list(self._waiting)[:MOST_ROWS]
        if not wanted:
            return
        size = bucket(max(request.positions for request in wanted), SHORTEST_ROW)
        rows = max(4, 1 << (len(wanted) - 1).bit_length()) if len(wanted) > 1 else 1
        if self._state is None:
            rows = min(rows, self._most_rows(size))
            self._state, self._rows = self.programs.free(rows, size), [None] * rows
            return
        size = max(size, self._state.cache.size)
        rows = max(min(rows, self._most_rows(size)), len(self._rows))
        if rows <= self._most_rows(size) and (rows, size) != (len(self._rows), self._state.cache.size):
            self._state = self.programs.resize(self._state, rows, size)
            self._rows += [None] * (rows - len(self._rows))

    def _most_rows(self, size):
        """The largest power of two whose keys and values take no more than half of the memory that was free."""
        fit = self._free_bytes // 2 // self._row_bytes(size)
        return min(MOST_ROWS, 1 << max(1, fit).bit_length() - 1)

    def _row_bytes(self, size) -> int:
        """Bytes of a row with room for `size` positions, on each device."""
        decoder = self._program.model.decoder
        with self._program.use():
            shared = sharding.ways("kv_heads") if decoder.kv_heads % sharding.ways("kv_heads") == 0 else 1
        of_position = 2 * decoder.depth * decoder.kv_heads * decoder.head_width * np.dtype(decoder.dtype).itemsize
        return size * of_position // shared + decoder.padded_vocabulary

    def check(self, request):
        """Raises ValueError if the keys and values of a request cannot fit the memory that was free at the start."""
        # Once where it is read, and once where it is decoded.
        needed = 2 * self._row_bytes(bucket(request.positions, SHORTEST_ROW))
        if needed > self._free_bytes:
            prompt = request.prompt
            raise ValueError(
                f"{prompt.name} takes {len(prompt):,} positions and max_new_tokens={request.limit:,} more, whose "
                f"keys and values need {storage.amount(needed)} of the {storage.amount(self._free_bytes)} that are "
                "free on each device: give a smaller max_new_tokens, or a shorter prompt"
            )

    def _admit(self):
        """Reads waiting requests into the free rows."""
        free = [row for row, request in enumerate(self._rows) if request is None]
        chosen = []
        while self._waiting and free[len(chosen) :] and self._waiting[0].positions <= self._state.cache.size:
            chosen.append(self._waiting.popleft())
        if not chosen:
            return
        keys = self._look_at(chosen)
        alike = collections.Counter(begin(key) for key in keys.values())
        together = []
        for request, key in keys.items():
            length, before = self._prefixes.find(key)
            again = request.asked_again or (begin(key) is not None and alike[begin(key)] > 1)
            if before is not None:
                self._fill(free.pop(0), request, self._read_on(request.prompt, key, length, before, again))
            elif again:
                hidden, keys_values, places = self._read([request.prompt])
                self._prefixes.keep(key, keys_values)
                self._fill(free.pop(0), request, (hidden, keys_values, *places[0]))
            else:
                together.append(request)
        with self._program.use():
            ways = sharding.ways("batch")
        for group in _groups(together, ways, lambda request: len(request.prompt)):
            hidden, keys_values, places = self._read([request.prompt for request in group], ways)
            for request, place in zip(group, places, strict=True):
                self._fill(free.pop(0), request, (hidden, keys_values, *place))

    def _look_at(self, requests):
        """Encodes the pictures of `requests`; their keys, without those that have a picture that cannot be read."""
        with contextlib.suppress(ValueError, OSError):  # it is found again below, and ends its request alone
            self.pictures.see([picture for request in requests for picture in request.prompt.pictures])
        keys = {}
        for request in requests:
            try:
                self.pictures.see(request.prompt.pictures)
                keys[request] = request.prompt.key(self.pictures.number)
            except (ValueError, OSError) as error:
                request.fail(error)
        return keys

    def _vectors(self, prompt, first=0):
        """What stands at the positions of a prompt from `first` on; see `Pictures.vectors`."""
        blend = None if prompt.blend is None else tuple(of[first:] for of in prompt.blend)
        return self.pictures.vectors(prompt.pictures, prompt.scale, prompt.slot[first:], prompt.newline, blend)

    def _read(self, prompts, ways=1):
        """Reads prompts together.

        Returns:
          hidden states, keys and values, and of each prompt `(g, last, first, length, following)`, as of `put`.
        """
        G = ways if len(prompts) > 1 else 1
        used, places = [0] * G, []
        for prompt in prompts:
            g, n = used.index(min(used)), len(prompt)
            places.append((g, used[g] + n - 1, used[g], n, prompt.following))
            used[g] += n
        batch, visual = self._blank(G, bucket(max(used)))
        for number, (prompt, (g, _, first, n, _)) in enumerate(zip(prompts, places, strict=True), start=1):
            at = np.s_[g, 0, first : first + n]
            batch["id"][at], batch["slot"][at], batch["segment"][at] = prompt.id, prompt.slot, number
            batch["position"][at] = prompt.position
            visual[:, *at] = self._vectors(prompt)
        hidden, keys_values = self.programs.read(batch, visual)
        return hidden, keys_values, places

    def _read_on(self, prompt, key, length, before, again):
        """Reads a prompt from `length` on; the arguments of `Programs.put` for it."""
        n = len(prompt) - length
        batch, visual = self._blank(1, bucket(n))
        at = np.s_[0, 0, :n]
        batch["id"][at], batch["slot"][at], batch["segment"][at] = prompt.id[length:], prompt.slot[length:], 1
        batch["position"][at] = prompt.position[length:]
        visual[:, *at] = self._vectors(prompt, length)
        size = max(bucket(len(prompt)), before[0].shape[3])
        hidden, keys_values = self.programs.read_on(batch, visual, before, length, size)
        if again:
            self._prefixes.keep(key, keys_values)
        return hidden, keys_values, 0, n - 1, 0, len(prompt), prompt.following

    def _blank(self, G, T):
        """A batch of padding, and its visual vectors."""
        decoder = self._program.model.decoder
        batch = {name: np.zeros((G, 1, T), np.int32) for name in ("id", "segment")}
        batch["position"] = np.zeros((G, 1, T, *decoder.position_shape), np.int32)
        batch["slot"] = np.full((G, 1, T), -1, np.int32)
        return batch, np.zeros((1 + self.programs.stacks, G, 1, T, decoder.width), decoder.dtype)

    def _fill(self, row, request, prompt):
        ids = np.full(self._state.cache.size, -1, np.int32)
        ids[: len(request.prompt)] = np.where(request.prompt.slot < 0, request.prompt.id, -1)
        s = request.sampling
        options = Options(
            temperature=np.float32(s.temperature),
            top_k=np.int32(s.top_k),
            top_p=np.float32(s.top_p),
            penalty=np.float32(s.repetition_penalty),
            seed=np.uint32(s.seed),
        )
        self._state = self.programs.put(self._state, row, prompt, ids, request.limit, options)
        self._rows[row] = request

    def expect(self, pictures, question) -> np.ndarray:
        """What the router expects `[S]` of each scale.

        Args:
          pictures: `Picture`s, one or more.
          question: ids of the question, see `data.questions`.

        Raises:
          ValueError, OSError: a picture that cannot be read.
        """
        with self._lock:
            model = self._program.model
            if model.density_router is not None:
                dense = float(np.asarray(self.programs.density(self.pictures.pooled(pictures)[None]))[0])
                return np.where(np.array(model.scales) == max(model.scales), dense, 1 - dense)
            grids = self.pictures.grids(pictures)  # [U, h, w, D]
            room = 1 << (len(grids) - 1).bit_length()  # so that few numbers of them are compiled
            shown = np.arange(room) < len(grids)
            grids = np.concatenate([grids, np.zeros((room - len(grids), *grids.shape[1:]), grids.dtype)])
            ids = pad_questions([question], 1, self._program.model.router.tokens)
            return np.asarray(self.programs.expect(grids[None], shown[None], ids))[0]

    def score(self, prompt, answers) -> list[float]:
        """Log-probabilities of answers to a `Prompt`, which is read once; `answers` are lists of ids, none empty."""
        with self._lock:
            self.pictures.see(prompt.pictures)
            before, known = self._all_but_last(prompt), len(prompt) - 1
            axes = [1] * (prompt.position.ndim - 1)
            found = []
            for group in _groups(answers, 1):
                batch, visual = self._blank(1, bucket(sum(map(len, group))))
                targets, used = np.zeros(batch["id"].shape[-1], np.int32), np.zeros(0, np.int64)
                for number, ids in enumerate(group, start=1):
                    # Each answer follows the prompt's last token, and sees nothing of the others.
                    first = len(used)
                    at = np.s_[0, 0, first : first + len(ids)]
                    batch["id"][at] = [prompt.id[-1], *ids[:-1]]
                    batch["segment"][at] = number
                    batch["position"][at] = prompt.position[-1] + np.arange(len(ids)).reshape(-1, *axes)
                    targets[first : first + len(ids)] = ids
                    used = np.append(used, [number] * len(ids))
                logprobs = np.asarray(self.programs.score(batch, visual, before, known, targets))[: len(used)]
                found += np.bincount(used, logprobs, minlength=len(group) + 1)[1:].tolist()
            return found

    def _all_but_last(self, prompt):
        """Keys and values of a prompt whose pictures were seen, of which all but the last position are asked for."""
        key = prompt.key(self.pictures.number)
        length, before = self._prefixes.find(key)
        if length == len(prompt) - 1:
            return before
        if before is not None:
            return self._read_on(prompt, key, length, before, True)[1]
        keys_values = self._read([prompt])[1]
        self._prefixes.keep(key, keys_values)
        return keys_values


def _groups(items, ways, length=len):
    """Items that are read together, in `ways` rows of `READ` positions, or in one of a longer item."""
    group, used = [], [0] * ways
    for item in items:
        if group and min(used) + length(item) > READ:
            yield group
            group, used = [], [0] * ways
        used[used.index(min(used))] += length(item)
        group.append(item)
    if group:
        yield group
