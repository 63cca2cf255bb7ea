# MobileNetV2 of half width, shown the digits at 64x64: its strides are for large images.
_base_ = "./digits.py"

custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)
model = dict(
    type="ImageClassifier",
    backbone=dict(type="MobileNetV2", widen_factor=0.5),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=1280, loss=dict(type="CrossEntropyLoss"), topk=(1,)),
)
larger = dict(type="Resize", scale=64)
train_pipeline = [*_base_.train_pipeline[:-1], larger, _base_.train_pipeline[-1]]
test_pipeline = [larger, *_base_.test_pipeline]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
