# StrucSpars turns the convolutions of a ResNet-18 into grouped ones, on generated images. Search: a constant learning
# rate and no weight decay, as published; delta is larger than for ImageNet, as there are far fewer iterations. Then the
# compact model trains on. The ordered norms of every layer go to TensorBoard after every fourth epoch.
_base_ = "../_base_/demo_resnet18.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="StrucSpars", target=dict(macs=0.55), warmup=2, delta=1e-5, interval=None),
    scope="backbone",
    input_size=64,
)
custom_hooks = [dict(type="prune_mm.PruningHook", image_interval=4)]
visualizer = dict(vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])

train_cfg = dict(max_epochs=16, val_interval=4)
optim_wrapper = dict(optimizer=dict(weight_decay=0.0))
param_scheduler = [dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=40)]
finetune = dict(
    optim_wrapper=dict(optimizer=dict(weight_decay=0.01)),
    param_scheduler=[
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=16, T_max=16)
    ],
)
