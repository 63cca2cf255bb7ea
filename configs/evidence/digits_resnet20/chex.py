# CHEX explores channels from random weights on, and takes all epochs. It updates less often than published, as an epoch
# has few iterations, and leaves shortcuts whole: cut to a few channels they would starve whole stages. Validated after
# every epoch, for the learning curves.
_base_ = "../_base_/digits_resnet20.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="CHEX",
        target=dict(macs=0.5),
        initial_regrow=0.4,
        interval=4,
        end=24,
        min_channels=2,
        prune_shortcuts=False,
        round_to=1,
    ),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

train_cfg = dict(val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
