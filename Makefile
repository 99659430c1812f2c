PYTHON ?= python3

.PHONY: demo test test-full lint bench study study-transformer study-moving

demo: .venv/installed          ## the whole pipeline on the embedded miniature, and a page of results
	.venv/bin/python demo.py

test: .venv/installed          ## every property, on CPU, in minutes
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist worksteal

test-full: .venv/installed     ## the full-size U-Net takes a training step on CPU, and all hostile input is tried (16 GB)
	.venv/bin/python -m pytest -m "full_size or thorough"

lint: .venv/installed
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

ARMS = baseline urepa token_only token_gram multi_layer cosine head_linear irepa
OWN_ARMS = head_mlp early_stop selfdistilled selfdistilled_token_gram
SELFDISTILLED = .venv/bin/python preprocessing/3_build_dino_cache.py --teacher data/demo/models/dinov2-selfdistilled --grid 4 --workers 0
LARGER = .venv/bin/python preprocessing/2_encode_vae_latents.py --base data/demo/models/sd15-mini --image-size 64 --workers 0
ABLATE = .venv/bin/python ablate.py --seeds 0 1 2 --jobs 2

study: demo                    ## variants of the method on the miniature, 3 seeds each (docs/study.md): hours on a CPU; goes on where it stopped
	.venv/bin/python preprocessing/0_make_demo.py --out data/demo --self-distilled
	$(SELFDISTILLED) --csv data/demo/train.csv --out data/demo/cache_selfdistilled/tokens
	$(SELFDISTILLED) --csv data/demo/val.csv --out data/demo/cache_selfdistilled_val/tokens
	$(LARGER) --csv data/demo/train.csv --out data/demo/cache_64/latents
	$(LARGER) --csv data/demo/val.csv --out data/demo/cache_64_val/latents
	$(ABLATE) --base configs/study/base.yaml --out runs/study $(ARMS:%=configs/ablations/%.yaml) $(OWN_ARMS:%=configs/study/%.yaml)
	$(ABLATE) --base configs/study/grid4.yaml --out runs/study_grid4 configs/ablations/baseline.yaml configs/ablations/urepa.yaml

MMDIT_ARMS = repa linear token_gram quarter half last early_stop
ADAPTED_ARMS = repa token_gram relation
ENCODE = .venv/bin/python preprocessing/2_encode_vae_latents.py --base data/demo/models/sd3-digits --image-size 32 --workers 0
MINI = --teacher data/demo/models/dinov2-mini --grid 4
SAMPLED = .venv/bin/python preprocessing/1_sample_imagenet_subset.py --imagenet data/demo/turned
MADE_TEXT = .venv/bin/python preprocessing/4_prepare_text_embeddings.py --base data/demo/models/sd3-digits

study-transformer: demo        ## REPA on a small MMDiT from scratch, and its adaptation by LoRA to other digits, 3 seeds each (docs/study.md)
	.venv/bin/python preprocessing/0_make_demo.py --out data/demo --transformer
	$(ENCODE) --csv data/demo/train.csv --out data/demo/cache_mmdit/latents
	$(ENCODE) --csv data/demo/val.csv --out data/demo/cache_mmdit_val/latents
	$(MADE_TEXT) --class-names data/demo/imagenet_classes.json --template '{class_name}' --max-sequence-length 8 --out data/demo/cache_mmdit/text
	$(ABLATE) --base configs/study/mmdit/base.yaml --out runs/study_mmdit configs/ablations/baseline.yaml $(MMDIT_ARMS:%=configs/study/mmdit/%.yaml)
	.venv/bin/python export.py runs/study_mmdit/baseline/seed0 --pipeline
	$(SAMPLED) --split train --per-class 139 --out data/demo/turned_train.csv
	$(SAMPLED) --split val --per-class 35 --out data/demo/turned_val.csv
	$(ENCODE) --csv data/demo/turned_train.csv --out data/demo/cache_turned/latents --fused data/demo/cache_turned/tokens $(MINI)
	$(ENCODE) --csv data/demo/turned_val.csv --out data/demo/cache_turned_val/latents --fused data/demo/cache_turned_val/tokens $(MINI)
	$(ABLATE) --base configs/study/adapt/turned.yaml --out runs/study_turned configs/ablations/baseline.yaml $(ADAPTED_ARMS:%=configs/study/mmdit/%.yaml)

MOVING_ARMS = per_frame crepa cumulative backbone relation

study-moving: .venv/installed  ## CREPA's variants on moving digits, 3 seeds each: an hour and a half on a CPU; goes on where it stopped
	.venv/bin/python demo.py --moving
	$(ABLATE) --base configs/study/moving/base.yaml --out runs/study_moving configs/ablations/baseline.yaml $(MOVING_ARMS:%=configs/study/moving/%.yaml)

BENCHMARKS = 'read_cache.py warm' 'read_cache.py cold' 'read_cache.py full_size' token_encodings.py

# --no-deps: with its own dependencies mosaicml-streaming would downgrade numpy and transformers.
bench: .venv/installed         ## our cache against other formats, into benchmarks/results (10 min, 6 GB; encoders: BENCHMARKS=write.py)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	@for name in $(BENCHMARKS); do OMP_NUM_THREADS=1 .venv/bin/python benchmarks/$$name || exit 1; done

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
