# CHEX explores channels from the trained backbone on, at a constant learning rate, and takes all epochs. Nearly all
# channels live at first, as the backbone is trained already. Shortcuts stay whole, else they end at 4 channels.
# Validated on the way, for the learning curves.
_base_ = "../_base_/shapes_ssd.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="CHEX",
        target=dict(macs=0.5),
        initial_regrow=0.6,
        interval=2,
        end=6,
        min_channels=4,
        prune_shortcuts=False,
        round_to=1,
    ),
    scope="backbone",
    input_size=96,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

train_cfg = dict(val_interval=2)
# With cut shortcuts, initial_regrow=0.3, interval=3 and end=9, 50 % end at 51.7, 39.8, 37.7 instead of 52.9, 48.7,
# 45.5 (test split). An end at 9 instead of 6 gives 56.6 and 48.9 instead of 56.1 and 50.3 (validation split).
# Curves are drawn of the first share only.
at_25 = dict(
    model=dict(pruner=dict(target=dict(macs=0.25), interval=3, end=9)),
    train_cfg=dict(val_interval=20),
)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
