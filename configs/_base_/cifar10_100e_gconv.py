# CIFAR-10 with GConv Prune's published recipe for CondenseNets: the dense network trains for 300 epochs with batches of
# 64; pruned it trains on for 100 with batches of 128, with masks.
_base_ = "./cifar10_60e_gconv.py"

pretrain = dict(
    train_dataloader=dict(batch_size=64),
    train_cfg=dict(max_epochs=300),
    param_scheduler=[
        dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=300, T_max=300, convert_to_iter_based=True)
    ],
)
train_cfg = dict(max_epochs=100)
optim_wrapper = dict(optimizer=dict(lr=5e-3, weight_decay=1e-4))
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[50, 75], gamma=0.1)]
