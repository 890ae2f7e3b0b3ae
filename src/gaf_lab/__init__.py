"""The lab: experiments with gradient agreement filtering. It imports `gaf`; `gaf` never imports it."""
