# CHEX explores channels from random weights on, at a constant learning rate, and takes all epochs.
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

train_cfg = dict(val_interval=3)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
