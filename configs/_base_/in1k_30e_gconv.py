# ImageNet with GConv Prune's published recipe: a pruned network trains on for 30 epochs, 128 images at a time.
_base_ = ["mmpretrain::_base_/datasets/imagenet_bs32.py", "mmpretrain::_base_/default_runtime.py"]
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=100)
test_dataloader = dict(batch_size=100)
val_cfg = dict()
test_cfg = dict()

train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=1e-2, momentum=0.9, weight_decay=5e-4))
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[10, 20], gamma=0.1)]
auto_scale_lr = dict(base_batch_size=128)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=3))
randomness = dict(seed=0)
