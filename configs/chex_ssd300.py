# CHEX on the stock SSD300 (VGG-16), COCO 2017. The paper has no such model, so all of this is ours: MMDetection's own
# schedule of 24 epochs (of 5 passes over the data), updates every epoch until 14. VGG has no norms, so every layer
# keeps the same share (allocation='uniform').
_base_ = "mmdet::ssd/ssd300_coco.py"
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="CHEX",
        target=dict(macs=0.5),
        initial_regrow=0.2,
        interval=1,
        end=14,
        allocation="uniform",
        regrow_allocation="uniform",
    ),
    scope="backbone",
    input_size=300,
)
custom_hooks = [*_base_.custom_hooks, dict(type="prune_mm.PruningHook")]
randomness = dict(seed=0)
