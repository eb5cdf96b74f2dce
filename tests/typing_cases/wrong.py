"""Mistakes that a type checker must find, each in its line and no other. Checked, never run."""

import fastdml_kernels
import torch

import fastdml
import fastdml.data
import fastdml.engine
import fastdml.train
from fastdml import Cohort, MutualLoss, mutual_loss, mutual_losses

logits = [torch.zeros(4, 10), torch.zeros(4, 10)]
labels = torch.zeros(4, dtype=torch.int64)

fastdml.mutual_los(logits, labels)  # error
fastdml.data.make_loaders()  # error
fastdml_kernels.mutual_los(logits)  # error
mutual_loss(logits, labels, temprature=2.0)  # error
mutual_loss(logits, labels, target="peer")  # error
mutual_loss(logits, labels, gate="right")  # error
mutual_loss(logits, labels, divergence="symmetric")  # error
mutual_loss(logits, labels, reduction="batchmean")  # error
mutual_loss(logits, labels, 2.0)  # error
mutual_losses(logits, labels, symmetric="yes")  # error
fastdml.linear_mutual_loss(logits, logits, labels, detach_targets=False)  # error
fastdml.linear_mutual_loss(logits, logits, labels, reduction="none")  # error
MutualLoss(label_smothing=0.1)  # error
MutualLoss(target="all")  # error

cohort = Cohort("resnet8", 10, sead=1)  # error
cohort.export("exported", format="tflite")  # error
optimizer = fastdml.engine.make_optimizer(cohort, "sdg", lr=0.1)  # error
fastdml.engine.make_step(cohort, MutualLoss(), optimizer, execution="graphs")  # error
fastdml.engine.make_step(cohort, MutualLoss(), optimizer, amp="bfloat16")  # error

fastdml.train.cifar100(epcohs=3)  # error
fastdml.train.cifar100(epochs="3")  # error
fastdml.train.cifar100(schedule="cosin")  # error
fastdml.train.cifar10(recipe="strong")  # error
fastdml.train.digits(data="cifar10")  # error
fastdml.train.market1501(recipe="best")  # error
fastdml.train.market1501(lr_drops=3)  # error
fastdml.train.folder(root="photos", normalise="own")  # error
fastdml.train.folder(recipe="strong")  # error
fastdml.load("run", weights="newest")  # error
fastdml.train.digits(callbacks=[len])  # error

fastdml.data.register_dataset("noise", task="classification")  # error
fastdml.models.register_model(purpose="a test")  # error
