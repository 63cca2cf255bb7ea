# A composition: CHEX to a larger share of the MACs, and when its exploration is over 1xN on what it left.
_base_ = "./chex.py"

chex = dict(type="CHEX", initial_regrow=0.4, interval=6, end=18, min_channels=4, round_to=1)
onexn = dict(type="OneByN", n=4, rearrange=True)
model = dict(pruner=[dict(chex, target=dict(macs=0.7)), dict(onexn, rate=0.325)])
at_25 = dict(model=dict(pruner=[dict(chex, target=dict(macs=0.5)), dict(onexn, rate=0.639)]))
train_cfg = dict(val_interval=60)
default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=1))
