# 1xN on the stock SSD300 (VGG-16), COCO 2017. The paper prunes classifiers only, so the schedule is ours: MMDetection's
# trained model loses half of the N x 1 blocks of every convolution of the VGG but the first, the published rate and N,
# and trains on for half of the stock schedule, with masks. For other blocks: --cfg-options model.pruner.n=4.
_base_ = "mmdet::ssd/ssd300_coco.py"
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="OneByN", n=16, rate=0.5, kernels="all", rearrange=True),
    scope="backbone",
    input_size=300,
)
custom_hooks = [*_base_.custom_hooks, dict(type="prune_mm.PruningHook")]
load_from = "https://download.openmmlab.com/mmdetection/v2.0/ssd/ssd300_coco/ssd300_coco_20210803_015428-d231a06e.pth"

train_cfg = dict(max_epochs=12)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
randomness = dict(seed=0)
