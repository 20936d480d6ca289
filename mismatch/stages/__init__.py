"""What a command does: one folder a stage, one contract (`base`), one runner. One line a stage: name -> class."""

STAGES = {
    "trace": "mismatch.stages.trace.stage:Trace",
    "probe": "mismatch.stages.probe.stage:Probe",
    "diagnose": "mismatch.stages.diagnose.stage:Diagnose",
    "scan": "mismatch.stages.scan.stage:Scan",
    "plan": "mismatch.stages.plan.stage:Plan",
    "repair": "mismatch.stages.repair.stage:Repair",
    "train": "mismatch.stages.train.stage:Train",
}
