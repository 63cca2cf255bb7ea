# StrucSpars on ResNet-50, ImageNet in RecordIO through NVIDIA DALI, as its authors load it; the files come from
#   tools/make_recordio.py pack data/imagenet_rec/train data/imagenet/train --pass-through
#   tools/make_recordio.py pack data/imagenet_rec/val data/imagenet/val --pass-through
# Everything else is strucspars_resnet50.py.
_base_ = "./strucspars_resnet50.py"

records = dict(type="prune_mm.RecordIODataset", data_root="data/imagenet_rec")
train_dataloader = dict(
    type="prune_mm.DALIDataLoader",
    dataset=dict(_delete_=True, **records, rec_file="train.rec", pipeline=_base_.train_pipeline),
)
val_dataloader = dict(
    type="prune_mm.DALIDataLoader",
    dataset=dict(_delete_=True, **records, rec_file="val.rec", pipeline=_base_.test_pipeline),
)
test_dataloader = val_dataloader
