# CHEX on ResNet-50, ImageNet through NVIDIA DALI, as CHEX's authors load it. Everything else is chex_resnet50.py.
_base_ = "./chex_resnet50.py"

train_dataloader = dict(type="prune_mm.DALIDataLoader")
val_dataloader = dict(type="prune_mm.DALIDataLoader")
test_dataloader = dict(type="prune_mm.DALIDataLoader")
