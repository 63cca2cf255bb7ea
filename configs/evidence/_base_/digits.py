# Handwritten digits at 32x32, split by writer (see prune_mm/datasets/digits.py): "val" is for choosing
# hyper-parameters, "test" for results only. Every row trains for 40 epochs in all.
_base_ = "mmpretrain::_base_/default_runtime.py"

data_preprocessor = dict(num_classes=10, mean=[61.0] * 3, std=[53.0] * 3, to_rgb=False)
train_pipeline = [dict(type="PackInputs")]
test_pipeline = [dict(type="PackInputs")]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="prune_mm.Digits", split="train", distorted=True, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=100,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="prune_mm.Digits", split="val", distorted=True, copies=3, pipeline=test_pipeline),
)
test_dataloader = dict(
    batch_size=100,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="prune_mm.Digits", split="test", distorted=True, copies=3, pipeline=test_pipeline),
)
val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = dict(type="Accuracy", topk=(1,))
val_cfg = dict()
test_cfg = dict()

train_cfg = dict(by_epoch=True, max_epochs=40, val_interval=40)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=5e-4))
# All epochs in one go, and half of them: for the dense network that is pruned, and for what follows.
whole = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", eta_min=1e-4, by_epoch=True, convert_to_iter_based=True, end=40, T_max=40),
]
half = dict(
    train_cfg=dict(max_epochs=20, val_interval=20),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
        dict(type="CosineAnnealingLR", eta_min=1e-4, by_epoch=True, convert_to_iter_based=True, end=20, T_max=20),
    ],
)
param_scheduler = whole
default_hooks = dict(logger=dict(interval=5), checkpoint=dict(interval=5, max_keep_ckpts=1))
log_processor = dict(window_size=5)
randomness = dict(seed=0)
