"""Start the answers of a request: the first when it is submitted, the others once its prompt is computed.

Those that run in the step that computes the prompt are sampled from the same logits. The others start in later steps,
as earlier ones end, and find the prompt in the prefix cache. So a large n takes no more of a step than a few requests.
"""

from __future__ import annotations

from qvl_runtime.prompt.box_calibration import BoxCalibration, BoxJudge
from qvl_runtime.prompt.box_spelling import BoxSpelling
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.output import OutputBuilder
from qvl_runtime.schedule.prefix_cache import Root
from qvl_runtime.schedule.request import Branch, Request
from qvl_runtime.schedule.runner import Runner
from qvl_runtime.schedule.sampling_state import SamplingState
from qvl_runtime.schedule.scheduler import Scheduler
from qvl_runtime.schedule.sequence import Sequence


class Answers:
    """Makes the branches of requests, and knows the requests that have some still to start."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        max_model_len: int,
        calibration: BoxCalibration | None = None,
    ) -> None:
        self.max_parallel: int | None = None  # answers of one request that are begun and not done; None: any number
        self._runner, self._scheduler, self._tokenizer = runner, scheduler, tokenizer
        self._max_tokens = min(max_model_len, runner.cache.num_slots)  # of prompt and answer
        self._unfinished: dict[Request, Root] = {}  # in order
        self.judge = BoxJudge(BoxSpelling(tokenizer), calibration)

    def new(self, request: Request, sequence: Sequence) -> Branch:
        """Return the next answer of a request. Raises `SamplingError` for token ids that the vocabulary lacks.

        Raises `ConstraintError` for an answer that is too short for what its constraint demands.
        """
        index, ids, model = len(request.branches), request.prompt.token_ids, self._runner.model
        output = OutputBuilder(request.prompt, request.params, self._tokenizer, self._max_tokens - len(ids), self.judge)
        constraint = None
        if request.constrain is not None:
            constraint = request.constrain(output.end_ids, output.remaining)
        sampling_state = SamplingState(
            request.params,
            ids,
            model.config.vocab_size,
            model.device,
            index,
            output.end_ids,
            constraint,
            self.judge.spelling,
        )
        branch = Branch(request, index, sequence, output, sampling_state)
        request.branches.append(branch)
        return branch

    def fork(self, branch: Branch) -> list[Branch]:
        """Start other answers of a prompt, if this step has computed it, as many as may run now."""
        request, started = branch.request, list[Branch]()
        if branch.index or branch.output.token_ids:
            return started
        while self._may_start(request) and self._scheduler.free_slots:
            fork = self.new(request, branch.sequence.fork())
            self._scheduler.start(fork)
            started.append(fork)
        return started

    def postpone(self, branch: Branch) -> None:
        """Have `start_more` start the answers that `fork` did not, once the prompt is computed.

        The whole prompt is published for them, its last block too, which is not full.
        """
        if self.postpones(branch):
            request = branch.request
            branch.sequence.publish(request.prompt.token_ids, branch.spans, tail=True)
            self._unfinished[request] = branch.sequence.root

    def postpones(self, branch: Branch) -> bool:
        """Whether `postpone` has anything to do once the step that computes the prompt is taken."""
        request = branch.request
        return len(request.branches) < request.params.n and request not in self._unfinished

    @property
    def due(self) -> bool:
        """Whether `start_more` would queue an answer."""
        return any(self._has_none_queued(request) and self._may_start(request) for request in self._unfinished)

    def start_more(self) -> None:
        """Queue the next answers of each request that has none in the queue: one for each free slot, at least one."""
        for request, root in list(self._unfinished.items()):
            if self._has_none_queued(request):
                for _ in range(max(1, self._scheduler.free_slots)):
                    if self._may_start(request):
                        self._scheduler.add(self.new(request, self._runner.cache.sequence(root.alpha, root.salt)))
            if len(request.branches) == request.params.n:
                del self._unfinished[request]

    def forget(self, request: Request) -> None:
        """Start no more answers of a request."""
        self._unfinished.pop(request, None)

    def _has_none_queued(self, request: Request) -> bool:
        return all(branch.running or branch.index in request.completions for branch in request.branches)

    def _may_start(self, request: Request) -> bool:
        begun, n = len(request.branches), request.params.n
        return begun < n and (self.max_parallel is None or begun - len(request.completions) < self.max_parallel)
