# 1xN on MobileNet V1, ImageNet, as published: half of the N x 1 blocks of the 13 pointwise convolutions go, 1,569,792
# weights. For other blocks: --cfg-options model.pruner.n=4. OpenMMLab has no trained MobileNet V1: tools/compress.py
# trains one first, with MMPretrain's recipe for V2; with weights of your own, give load_from to tools/train.py.
_base_ = ["./_base_/models/mobilenet_v1_in1k.py", "./_base_/in1k_180e_onexn.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="OneByN", n=16, rate=0.5, rearrange=True),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(
    train_cfg=dict(max_epochs=300),
    optim_wrapper=dict(optimizer=dict(lr=0.045)),
    param_scheduler=[dict(type="StepLR", by_epoch=True, step_size=1, gamma=0.98)],
)
