"""Tell a webhook of every run of this project's flows that ends badly: an automation of Prefect.

Chats take what is sent, `{"text": "..."}`, as a message. The server sends it, so that it is sent
even if the machine that ran the flow is gone.
"""

import os
from contextlib import suppress
from typing import Any

from flows.server import QUIET

NAME = "prefopt-failures"
ADDRESS = "PREFOPT_WEBHOOK_URL"
# Jinja, which the server fills in; a message may hold quotes, so that JSON is made of it.
MESSAGE = (
    "{% set text %}{{ flow.name }}, run {{ flow_run.name }}: {{ flow_run.state.name }}. "
    "{{ flow_run.state.message }} {{ flow_run|ui_url }}{% endset %}"
    '{"text": {{ text|tojson }}}'
)


def notify() -> str:
    """Make the automation, or make it anew, at the server of PREFECT_API_URL; says what it does.

    Raises:
        ValueError: if the server or the webhook's address is not given.
    """
    for name in (ADDRESS, "PREFECT_API_URL"):
        if not os.environ.get(name):
            raise ValueError(f"{name}: not set, got nothing; set it in the environment")
    os.environ.update(QUIET)  # Prefect reads it when it is imported.
    from prefect.automations import Automation
    from prefect.blocks.webhook import Webhook
    from prefect.events.actions import CallWebhook
    from prefect.events.schemas.automations import EventTrigger, Posture

    # An address may be a secret itself: Prefect keeps it encrypted.
    address = {"url": os.environ[ADDRESS], "headers": {"Content-Type": "application/json"}}
    webhook: Any = Webhook.model_validate(address).save(NAME, overwrite=True)
    actions: list[Any] = [CallWebhook(block_document_id=webhook, payload=MESSAGE)]
    automation = Automation(
        name=NAME,
        description="Tell a webhook of every run of prefopt's flows that ends badly",
        trigger=EventTrigger(
            expect={f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": "prefopt-*"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=actions,
    )
    with suppress(ValueError):  # There was none.
        former: Any = Automation.read(name=NAME)
        former.delete()
    automation.create()
    return (
        f"automation '{NAME}': failed and crashed runs of flows prefopt-* are told to the webhook"
    )
