# CHEX explores channels from random weights on, at a constant learning rate, and takes all epochs; learning rates as
# of the dense row.
_base_ = "../_base_/digits_mobilenetv2.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="CHEX",
        target=dict(macs=0.5),
        initial_regrow=0.4,
        interval=6,
        end=18,
        min_channels=4,
        round_to=1,
    ),
    scope="backbone",
    input_size=48,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

param_scheduler = [
    dict(_base_.warmup, begin=0, end=20),
    dict(_base_.warmup, begin=990, end=1010),
    dict(_base_.cycle, begin=30, end=60),
]
train_cfg = dict(val_interval=3)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
