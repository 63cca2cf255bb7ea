# CHEX compresses the backbone of a small SSD to 50 % of its MACs, on generated images.
_base_ = "../_base_/demo_ssd_r18.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="CHEX", target=dict(macs=0.5), initial_regrow=0.3, interval=1, end=6),
    scope="backbone",
    input_size=128,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
