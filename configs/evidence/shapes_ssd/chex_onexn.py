# A composition: CHEX to a larger share of the MACs, and when its exploration is over 1xN on what it left.
_base_ = "./chex.py"

chex = dict(type="CHEX", initial_regrow=0.6, interval=2, end=6, min_channels=4, prune_shortcuts=False, round_to=1)
onexn = dict(type="OneByN", n=4, kernels="all", rearrange=True, ignore=[".*downsample.*"])
model = dict(pruner=[dict(chex, target=dict(macs=0.7)), dict(onexn, rate=0.343)])
at_25 = dict(model=dict(pruner=[dict(chex, target=dict(macs=0.5)), dict(onexn, rate=0.66)]))
train_cfg = dict(val_interval=20)
default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=1))
