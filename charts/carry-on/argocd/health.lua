-- Argo CD's health of a BaseModelPool, a CarryOnJob or a CarryOnDeployment. Argo CD runs Lua 5.1, gives the object as the
-- global `obj` and wants a table with `status` and `message` back. The answers are those that kstatus gives Flux, and more:
-- without a status an object is Progressing, and a suspended job is Suspended.

local function progressing(message)
  return { status = "Progressing", message = message }
end

local status = obj.status or {}
local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end

if next(conditions) == nil then
  return progressing("waiting for the operator's first status")
end
if (status.observedGeneration or 0) < (obj.metadata.generation or 0) then
  return progressing("waiting for the operator to see the last change")
end

-- In this order: a job that has ended or is suspended says Ready or Stalled too.
local verdicts = {
  { "Failed", "Degraded" },
  { "Complete", "Healthy" },
  { "Suspended", "Suspended" },
  { "Stalled", "Degraded" },
  { "Reconciling", "Progressing" },
  { "Ready", "Healthy" },
}
for _, verdict in ipairs(verdicts) do
  local condition = conditions[verdict[1]]
  if condition ~= nil and condition.status == "True" then
    return { status = verdict[2], message = condition.message }
  end
end
return progressing("no condition holds yet")
