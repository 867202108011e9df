"""Flow runs whose processes are gone, and that nobody told Prefect of.

A process that is killed says nothing, and the server would show its flow run as running for ever.
So every flow run bears a tag that names its process, and whichever comes next on that machine ends
those whose processes are gone: with their tasks, and with the stages that workers run for them.
"""

from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.states import Cancelling, Crashed

from flows.processes import is_gone, name_of_process

UNDER_WAY = [StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED]


def check_in() -> list[UUID]:
    """Tag this flow's run with its process; end, and give, the runs whose processes are gone.

    A server that is away costs a line in the log: the next flow does it.
    """
    log = get_run_logger()
    gone: list[UUID] = []
    running = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING]))
    try:
        with get_client(sync_client=True) as client:
            tags = [*flow_run.tags, name_of_process()]
            client.update_flow_run(UUID(flow_run.id), tags=tags)
            for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=running)):
                if any(map(is_gone, run.tags)):
                    log.warning("flow run '%s' was killed: it is shown as crashed now", run.name)
                    end(client, run.id, "its process is gone")
                    gone.append(run.id)
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        log.warning("killed flows: Prefect's server was not asked, got %s", error)
    return gone


def end(client: SyncPrefectClient, run: UUID, why: str) -> None:
    """Show a flow run that can no longer say so, and its tasks, as crashed; cancel its children."""
    crashed = Crashed(message=why)
    client.set_flow_run_state(run, crashed, force=True)
    itself = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    state = TaskRunFilterState(type=TaskRunFilterStateType(any_=UNDER_WAY))
    for task in client.read_task_runs(
        flow_run_filter=itself, task_run_filter=TaskRunFilter(state=state)
    ):
        client.set_task_run_state(task.id, crashed, force=True)
    children = FlowRunFilter(
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNDER_WAY)),
    )
    for child in client.read_flow_runs(flow_run_filter=children):
        client.set_flow_run_state(child.id, Cancelling(message=why))
