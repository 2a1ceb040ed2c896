"""The server: averages what the clients trained, exactly, and looks how good it is."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict

from fedex_lora.flower import FedExLora, load_global, save_global
from tiny_llm.model import ROWS, get_model, loss_on

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    config = context.run_config
    model = get_model()

    # With FedAvg:
    # strategy = FedAvg(fraction_train=float(config["fraction-train"]), fraction_evaluate=0.0)
    strategy = FedExLora(
        model.peft_config["default"],
        fraction_train=float(config["fraction-train"]),
        fraction_evaluate=0.0,
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )
    if config["save-path"]:  # with FedAvg: model.save_pretrained
        save_global(model, result.arrays, str(config["save-path"]))


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """The global model's loss on everybody's rows."""
    model = get_model()
    load_global(model, arrays)
    model.eval()
    with torch.no_grad():
        loss = loss_on(model, [row for rows in ROWS for row in rows])
    return MetricRecord({"loss": loss.item()})
