# 1xN on Mask R-CNN R50-FPN, COCO 2017. The paper prunes classifiers only, so the schedule is ours: MMDetection's
# trained model loses half of the N x 1 blocks of every convolution of its backbone behind the stem, the published rate
# and N, and trains on for 45k iterations of 32 images, with masks. For other blocks: --cfg-options model.pruner.n=4.
_base_ = "./_base_/maskrcnn_r50_270k.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="OneByN", n=16, rate=0.5, kernels="all", rearrange=True),
    scope="backbone",
    input_size=(800, 1344),
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
load_from = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/mask_rcnn_r50_fpn_2x_coco/"
    "mask_rcnn_r50_fpn_2x_coco_bbox_mAP-0.392__segm_mAP-0.354_20200505_003907-3e542a40.pth"
)

train_cfg = dict(max_iters=45000, val_interval=15000)
optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = [
    dict(type="LinearLR", start_factor=1.0 / 3.0, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=45000, by_epoch=False, milestones=[30000, 40000], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(interval=5000))
