"""One client: loads the global model, trains its adapter on the rows it has, sends it back."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict

from fedex_lora.flower import load_global
from tiny_llm.model import ROWS, get_model, loss_on

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Fine-tunes the LoRA factors."""
    rows = ROWS[int(context.node_config["partition-id"]) % len(ROWS)]
    model = get_model()
    # With FedAvg:
    # set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    load_global(model, msg.content)

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=float(context.run_config["learning-rate"]))
    model.train()
    for _ in range(int(context.run_config["local-steps"])):
        loss = loss_on(model, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(rows)})
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)
