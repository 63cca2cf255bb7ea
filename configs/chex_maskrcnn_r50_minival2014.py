# CHEX on Mask R-CNN R50-FPN with the data its authors name: COCO 2014, train and valminusminival, tested on minival.
# These are the images of train2017 and val2017 under their old names; take this config where only the 2014 files are.
#   tools/prepare_data.py minival2014 data/coco
# writes the two annotation files of the split. Everything else is chex_maskrcnn_r50.py.
_base_ = "./chex_maskrcnn_r50.py"

coco = _base_.train_dataloader.dataset
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="ConcatDataset",
        datasets=[
            dict(coco, ann_file="annotations/instances_train2014.json", data_prefix=dict(img="train2014/")),
            dict(coco, ann_file="annotations/instances_valminusminival2014.json", data_prefix=dict(img="val2014/")),
        ],
    )
)
val_dataloader = dict(dataset=dict(ann_file="annotations/instances_minival2014.json", data_prefix=dict(img="val2014/")))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_base_.val_dataloader.dataset.data_root + "annotations/instances_minival2014.json")
test_evaluator = val_evaluator
