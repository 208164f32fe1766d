"""A user's program, which names all that is public: type checkers and Python both take it."""

import torch
from torch import Tensor
from typing_extensions import assert_type

import tribn
from tribn.functional import batch_norm, batch_stats


class Block(torch.nn.Module):
    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device)
        self.norm = tribn.BatchNorm2d(
            channels, device=device, activation="relu", stats_dtype=torch.float32
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), residual=x)


x = torch.randn(4, 3, 8, 8)
assert_type(Block(3).norm(x), Tensor)
assert_type(tribn.BatchNorm1d(3)(x.flatten(2), mask=torch.ones(4, 64, dtype=torch.bool)), Tensor)
assert_type(tribn.BatchNorm1d(8, channel_axis=-1)(x[0], lengths=torch.tensor([8, 3, 0])), Tensor)
assert_type(tribn.BatchNorm3d(3, momentum=None, nonfinite="skip")(x.unsqueeze(2)), Tensor)
assert_type(tribn.LazyBatchNorm1d(activation=torch.nn.LeakyReLU(0.2))(x.flatten(2)), Tensor)
assert_type(tribn.LazyBatchNorm2d(order="act_norm", correction=0)(x), Tensor)
assert_type(tribn.LazyBatchNorm3d(memory="inplace", bias=False)(x.unsqueeze(2)), Tensor)

assert_type(tribn.SyncBatchNorm(3, process_group=None, activation="silu")(x), Tensor)

mean, var, count = batch_stats(x)
assert_type((mean, var, count), tuple[Tensor, Tensor, Tensor])
assert_type(batch_norm(x, mean, var, training=True, num_batches_tracked=count), Tensor)
assert_type(tribn.functional.batch_norm(x, None, None, training=True), Tensor)

scaler = tribn.StandardScaler(3).partial_fit(x)
assert_type(scaler, tribn.StandardScaler)
assert_type(scaler(x), Tensor)
assert_type(scaler.inverse(x), Tensor)
assert_type(scaler.mean_, Tensor)

model = torch.nn.Sequential(Block(3), Block(3))
tribn.update_stats(model, [x, [x, None]], "cpu", progress=False)
with tribn.accumulate_stats(model):
    model(x)
assert_type(tribn.unfreeze(tribn.freeze(model)), torch.nn.Sequential)
assert_type(tribn.convert(model, fuse=False), torch.nn.Sequential)
converted, report = tribn.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), report=True)
assert_type(report, tribn.Report)
assert_type(report.counts["replaced"] + len(report.rows), int)
assert_type(tribn.revert(converted), torch.nn.Sequential)
assert_type(tribn.convert_sync_batchnorm(model), torch.nn.Sequential)
tribn.set_sm_margin(0)
tribn.explain(Block(3).norm, x, residual=x)
tribn.explain(x, training=True)
print(tribn.__version__)
