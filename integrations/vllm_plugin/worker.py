"""What `collective_rpc` can ask vLLM's workers about drafting."""

from __future__ import annotations

from typing import Any

from qm_spec.integrations.vllm_plugin.session import DraftSession


class QuickMergeWorkerExtension:
    """Methods of vLLM's worker, put there by its own option `worker_extension_cls`.

    An engine with our drafter has them unless its user names another class there, which may be an heir of this one.
    """

    model_runner: Any

    def qm_spec_stats(self) -> dict[str, Any]:
        """Return the engine's counters since it started, and whether it drafts."""
        session = _session(self.model_runner)
        return {"drafting": session.switch.on and not session.failed, **session.counters.by_name()}

    def qm_spec_drafting(self, state: str) -> dict[str, Any]:
        """Turn drafting `on` or `off` for all requests, from the next step on.

        Raises:
            ValueError: `state` is neither.
        """
        if state not in ("on", "off"):
            raise ValueError(f"qm_spec_drafting: the state must be 'on' or 'off', got {state!r}")
        _session(self.model_runner).turn(state == "on")
        return self.qm_spec_stats()


def _session(runner: Any) -> DraftSession:
    """Return the session of vLLM's V1 or V2 runner."""
    drafter = getattr(runner, "drafter", None) or runner.speculator
    session: DraftSession = drafter.model.session
    return session
