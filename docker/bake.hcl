// docker buildx bake -f docker/bake.hcl [TARGET]     CUDA's wheels are for amd64 and arm64 too.
variable "REGISTRY" { default = "" }
variable "TAG" { default = "latest" }
variable "REVISION" { default = "unknown" }
variable "VERSION" { default = "unknown" }

group "default" { targets = ["harness", "cpu", "llama", "cuda"] }

target "common" {
  context    = "."
  dockerfile = "docker/Dockerfile"
  platforms  = ["linux/amd64", "linux/arm64"]
  args       = { REVISION = REVISION, VERSION = VERSION }
}

target "image" {
  inherits = ["common"]
  name     = kind
  matrix   = { kind = ["harness", "cpu", "llama", "cuda"] }
  target   = kind
  tags     = ["${REGISTRY}batching-lab:${kind}-${TAG}"]
}
